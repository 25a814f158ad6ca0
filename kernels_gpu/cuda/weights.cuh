// All weight types.
#pragma once
#include "weight_float.cuh"
#include "weight_q2_k.cuh"
#include "weight_q3_k.cuh"
#include "weight_q4_0.cuh"
#include "weight_q4_1.cuh"
#include "weight_q4_k.cuh"
#include "weight_q5_0.cuh"
#include "weight_q5_1.cuh"
#include "weight_q5_k.cuh"
#include "weight_q6_k.cuh"
#include "weight_q8_0.cuh"

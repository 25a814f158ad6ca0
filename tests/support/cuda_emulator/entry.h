// Included after a kernel's source: calls EMULATOR_KERNEL with arguments by address, says what they are, poisons shared memory.
template <class T> struct EmulatorKind { static const char code = '?'; };
template <class T> struct EmulatorKind<T*> { static const char code = 'p'; };
template <> struct EmulatorKind<int> { static const char code = 'i'; };
template <> struct EmulatorKind<unsigned> { static const char code = 'i'; };
template <> struct EmulatorKind<long long> { static const char code = 'l'; };
template <> struct EmulatorKind<float> { static const char code = 'f'; };
template <int... kIndex> struct EmulatorIndices {};
template <int n, int... kIndex> struct EmulatorCount : EmulatorCount<n - 1, n - 1, kIndex...> {};
template <int... kIndex> struct EmulatorCount<0, kIndex...> { typedef EmulatorIndices<kIndex...> Type; };

template <class... A, int... kIndex>
void emulator_apply(void (*kernel)(A...), void** args, EmulatorIndices<kIndex...>) {
  kernel(*static_cast<A*>(args[kIndex])...);
}
template <class... A>
void emulator_apply(void (*kernel)(A...), void** args) {
  emulator_apply(kernel, args, typename EmulatorCount<sizeof...(A)>::Type());
}
template <class... A>
const char* emulator_codes(void (*)(A...)) {
  static const char codes[] = {EmulatorKind<A>::code..., 0};
  return codes;
}

extern "C" {
extern char __start_pyinfer_shared[] __attribute__((weak)), __stop_pyinfer_shared[] __attribute__((weak));
void emulator_call(void** args) { emulator_apply(EMULATOR_KERNEL, args); }
const char* emulator_signature() { return emulator_codes(EMULATOR_KERNEL); }
int emulator_static_shared() { return __start_pyinfer_shared ? int(__stop_pyinfer_shared - __start_pyinfer_shared) : 0; }
void emulator_poison(unsigned char value) {
  if (__start_pyinfer_shared) memset(__start_pyinfer_shared, value, size_t(__stop_pyinfer_shared - __start_pyinfer_shared));
}
}

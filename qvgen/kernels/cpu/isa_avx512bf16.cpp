// The same source with other flags.
#include "isa_avx512vnni.cpp"

// What this CPU has beyond the instructions that all files are compiled for. Functions that need
// more say so in an attribute, and are called where it is there.
#pragma once

// Whether it has AVX512-BF16.
bool pairs_here();

// Whether it has AMX for bfloat16 too, and the kernel lets this process use it.
bool tiles_here();

#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_160 = attention_entry<160>();
}

#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_32 = attention_entry<32>();
}

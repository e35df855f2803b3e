#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_96 = attention_entry<96>();
}

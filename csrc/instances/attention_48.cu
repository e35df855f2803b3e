#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_48 = attention_entry<48>();
}

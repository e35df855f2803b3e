#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_80 = attention_entry<80>();
}

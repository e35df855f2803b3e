#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_40 = attention_entry<40>();
}

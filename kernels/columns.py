"""The columns of a sampler's table, by name. No Triton here: makers of tables import it too."""

COLUMNS: tuple[str, ...] = (
    *("a", "b", "clip"),
    *("c_x", "c_0", "c_1", "c_2", "c_3", "c_y", "c_m", "c_u", "s"),
    *("d_x", "d_0", "d_1", "d_2", "d_3", "d_y", "d_u"),
    *("e_x", "e_0", "e_m", "e_u"),
    *("guidance", "rescale"),
)

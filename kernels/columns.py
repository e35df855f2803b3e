"""The columns of a sampler's table, by name. No Triton here: makers of tables import it too."""

COLUMNS: tuple[str, ...] = (
    *("a", "b", "clip"),
    *("c_x", "c_0", "c_1", "c_2", "c_y", "c_m", "s"),
    *("d_x", "d_0", "d_1", "d_2", "d_y"),
    *("e_x", "e_0", "e_m"),
    *("guidance", "rescale"),
)

//! The largest grids and vocabularies there may be.

/// The most rows or columns that a grid may have.
pub const MAX_SIDE: usize = 65_535;

/// The most cells that a grid may have, so that positions in it fit 31 bits with borders around it.
pub const MAX_CELLS: usize = 1 << 28;

/// The most tokens (codebook ids and merges) that a vocabulary may have, so that a table with a row per token is of
/// reasonable size even if a file asks for more.
pub const MAX_VOCAB_SIZE: u32 = 1 << 24;

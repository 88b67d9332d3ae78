//! Everything that can go wrong, with where it went wrong.

use crate::limits::{MAX_CELLS, MAX_SIDE, MAX_VOCAB_SIZE};

/// The result of anything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What is wrong, and where. The first group is about grids and ids, the second about vocabularies.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A grid with no cells, or with a side that is too long, or with too many cells.
    #[error(
        "grid {grid} is {height}x{width}; expected at least one cell, at most {MAX_SIDE} rows and columns, and at most \
         {MAX_CELLS} cells"
    )]
    GridSize {
        /// Index of the grid in the input.
        grid: usize,
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// A number of ids that does not fill the grid.
    #[error("grid {grid}: {length} ids for {height}x{width} cells")]
    GridLength {
        /// Index of the grid in the input.
        grid: usize,
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
        /// Number of ids.
        length: usize,
    },
    /// An id that is negative or not in the codebook.
    #[error(
        "grid {grid}, row {row}, column {column}: id {id} is not in the codebook, expected 0 to {}",
        base_vocab_size - 1
    )]
    GridId {
        /// Index of the grid in the input.
        grid: usize,
        /// Row of the cell.
        row: usize,
        /// Column of the cell.
        column: usize,
        /// Its id.
        id: i128,
        /// Number of ids in the codebook.
        base_vocab_size: u32,
    },
    /// Tokens that do not tile the grid.
    #[error("position {position}: {problem}")]
    Tokens {
        /// Index of the first token that does not fit.
        position: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A map of regions that does not belong to the tokens.
    #[error("regions: {0}")]
    Regions(String),

    /// An option with a value that cannot be used.
    #[error("{name} = {value}: expected {expected}")]
    Option {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// A vocabulary with more tokens than ids can tell apart.
    #[error("{base_vocab_size} codebook ids and {num_merges} merges make more than {MAX_VOCAB_SIZE} tokens")]
    VocabularySize {
        /// Number of ids in the codebook.
        base_vocab_size: u32,
        /// Number of merges.
        num_merges: usize,
    },
    /// A vocabulary file that is not JSON, or lacks a field, or has one of the wrong type.
    #[error("not a visual BPE vocabulary: {0}")]
    Format(String),
    /// A merge that cannot be.
    #[error("merge {merge}: {problem}")]
    Merge {
        /// Index of the merge, in the order learned.
        merge: usize,
        /// What is wrong with it.
        problem: String,
    },

    /// A vocabulary that training cannot go on from.
    #[error("cannot resume from this vocabulary: {0}")]
    Resume(String),

    /// There is not enough memory.
    #[error("not enough memory: {bytes} bytes for {purpose} are not to be had")]
    Memory {
        /// Size of the block that was asked for.
        bytes: usize,
        /// What it was for.
        purpose: &'static str,
    },
    /// The work was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The operating system gave no threads.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// Number of threads to start.
        threads: usize,
        /// The system's reason.
        reason: String,
    },
}

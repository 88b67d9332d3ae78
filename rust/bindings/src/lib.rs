//! The Python module `being_vl._core`: arrays in and out, errors, the GIL, Ctrl-C. The algorithms are in the core.

mod arrays;
mod corpus;
mod errors;
mod vocabulary;
mod work;

use being_vl_core::HugePages;
use pyo3::prelude::*;

#[global_allocator]
static ALLOCATOR: HugePages = HugePages;

/// Visual BPE in Rust; `being_vl.VisualBPE` is its public face.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::errors::{BeingVLError, GridError, VocabularyError};
    #[pymodule_export]
    use crate::vocabulary::Vocabulary;
}

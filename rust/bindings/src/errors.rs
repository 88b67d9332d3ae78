//! Errors of the core as Python exceptions.

use being_vl_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyValueError};
use pyo3::prelude::*;

create_exception!(being_vl._core, BeingVLError, PyValueError, "Input or an option that cannot be used.");
create_exception!(being_vl._core, GridError, BeingVLError, "A grid, or tokens for one, that cannot be used.");
create_exception!(being_vl._core, VocabularyError, BeingVLError, "A vocabulary that cannot be used.");

/// The exception for an error of the core.
pub(crate) fn to_python(error: &Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::GridSize { .. }
        | Error::GridLength { .. }
        | Error::GridId { .. }
        | Error::Tokens { .. }
        | Error::Regions(_) => GridError::new_err(message),
        Error::Format(_) | Error::Merge { .. } | Error::VocabularySize { .. } => {
            VocabularyError::new_err(message)
        }
        Error::Memory { .. } => PyMemoryError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(()),
        _ => BeingVLError::new_err(message),
    }
}

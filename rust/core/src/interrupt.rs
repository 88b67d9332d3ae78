//! Stopping long work from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::memory;

/// A flag that asks training or encoding to stop. Clones are the same flag.
#[derive(Debug, Default, Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks the work that holds this flag to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the work was asked to stop, or has to since there is no memory.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed) || memory::is_short()
    }

    /// Fails if the work was asked to stop, or has to since there is no memory.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if the work was asked to stop, [`Error::Memory`] if there is no memory for small things.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { memory::check_reserve() }
    }
}

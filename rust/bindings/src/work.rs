//! Long work: without the GIL, on a thread of its own, while the calling thread listens for Ctrl-C.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{Builder, scope};
use std::time::Duration;

use being_vl_core::{Error, Interrupt, Result};
use pyo3::prelude::*;

use crate::errors::{BeingVLError, to_python};

/// Time between two looks at signals.
const TICK: Duration = Duration::from_millis(50);

/// Runs `work`; every tick the calling thread looks for signals and calls `on_tick`, whose error stops the work.
pub(crate) fn run<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&Interrupt) -> Result<T> + Send,
    on_tick: impl Fn(Python<'_>) -> PyResult<()> + Send + Sync,
) -> PyResult<T> {
    py.detach(|| {
        let interrupt = Interrupt::default();
        scope(|scope| {
            let (alive, finished) = channel::<()>();
            let worker = || {
                let _alive = alive;
                work(&interrupt)
            };
            let worker = Builder::new()
                .spawn_scoped(scope, worker)
                .map_err(|error| to_python(&Error::Threads { threads: 1, reason: error.to_string() }))?;
            let mut stopped = None;
            while finished.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                if stopped.is_none() {
                    stopped = Python::attach(|py| py.check_signals().and_then(|()| on_tick(py))).err();
                    if stopped.is_some() {
                        interrupt.set();
                    }
                }
            }
            let result = worker.join();
            match (stopped, result) {
                (Some(error), _) => Err(error),
                (None, Ok(result)) => result.map_err(|error| to_python(&error)),
                (None, Err(_)) => Err(BeingVLError::new_err("internal error, please report it (see stderr)")),
            }
        })
    })
}

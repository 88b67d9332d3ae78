//! Long work: without the GIL, on threads of its own, while the calling thread listens for Ctrl-C.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, available_parallelism, scope};
use std::time::Duration;

use being_vl_core::{Error, Interrupt, Result};
use pyo3::prelude::*;

use crate::errors::{BeingVLError, to_python};

/// Time between two looks at signals.
const TICK: Duration = Duration::from_millis(50);

/// Jobs made ahead of those that are done, for each thread: enough to go on with while another Python thread has the GIL.
const AHEAD: usize = 16;

fn cannot_start(threads: usize, error: &std::io::Error) -> PyErr {
    to_python(&Error::Threads { threads, reason: error.to_string() })
}

fn crashed() -> PyErr {
    BeingVLError::new_err("internal error, please report it (see stderr)")
}

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
            let worker =
                Builder::new().spawn_scoped(scope, worker).map_err(|error| cannot_start(1, &error))?;
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
                (None, Err(_)) => Err(crashed()),
            }
        })
    })
}

/// Does jobs on other threads (0: one per core). The calling thread makes the jobs and takes the results, in order and
/// with the GIL. A single job is done at once, without a thread, if `is_short`.
pub(crate) fn stream<J: Send, R: Send>(
    py: Python<'_>,
    threads: usize,
    mut next: impl FnMut() -> PyResult<Option<J>>,
    is_short: impl Fn(&J) -> bool,
    work: impl Fn(J, &Interrupt) -> Result<R> + Send + Sync,
    mut take: impl FnMut(R) -> PyResult<()>,
) -> PyResult<()> {
    let Some(first) = next()? else { return Ok(()) };
    let second = next()?;
    if second.is_none() && is_short(&first) {
        let result = py.detach(|| work(first, &Interrupt::default()));
        return take(result.map_err(|error| to_python(&error))?);
    }
    let mut ready = [Some(first), second].into_iter().flatten();
    let mut next = || ready.next().map_or_else(&mut next, |job| Ok(Some(job)));

    let threads = match threads {
        0 => available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let interrupt = Interrupt::default();
    let (jobs, queue) = channel::<(usize, J)>();
    let (sender, mut results) = channel();
    let queue = Mutex::new(queue);
    let worker = |results: Sender<_>| {
        // The lock is held by the worker that waits, and waiting does not panic.
        while let Ok((number, job)) = queue.lock().unwrap_or_else(PoisonError::into_inner).recv() {
            let result = catch_unwind(AssertUnwindSafe(|| work(job, &interrupt)));
            // If nobody listens any more, the queue will end, too.
            results.send((number, result)).ok();
        }
    };
    scope(|scope| {
        let (mut made, mut taken, mut workers, mut more) = (0, 0, 0, true);
        let mut waiting = BTreeMap::new();
        let mut go_on = || {
            while more || taken < made {
                py.check_signals()?;
                if more && made - taken < threads * AHEAD {
                    match next()? {
                        Some(job) => {
                            jobs.send((made, job)).map_err(|_| crashed())?;
                            made += 1;
                        }
                        None => more = false,
                    }
                    if workers < threads.min(made) {
                        let results = sender.clone();
                        Builder::new()
                            .spawn_scoped(scope, || worker(results))
                            .map_err(|error| cannot_start(threads, &error))?;
                        workers += 1;
                    }
                } else {
                    let results = &mut results;
                    if let Ok((number, result)) = py.detach(move || results.recv_timeout(TICK)) {
                        waiting.insert(number, result);
                    }
                }
                while let Some(result) = waiting.remove(&taken) {
                    take(result.map_err(|_| crashed())?.map_err(|error| to_python(&error))?)?;
                    taken += 1;
                }
            }
            Ok(())
        };
        let outcome = go_on();
        if outcome.is_err() {
            interrupt.set();
        }
        // The workers end with the queue.
        drop(jobs);
        outcome
    })
}

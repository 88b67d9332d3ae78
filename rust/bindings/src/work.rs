//! Long work: without the GIL, on threads of its own, while the calling thread listens for Ctrl-C.

use std::collections::{BTreeMap, VecDeque};
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

/// Cells copied ahead of those that are encoded, for each thread: enough to go on with while another Python thread has
/// the GIL.
const AHEAD: usize = 1 << 19;

/// Below this many cells, encoding is over before a thread would have started.
pub(crate) const SMALL: usize = 1 << 16;

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
/// with the GIL. A single small job is done without another thread.
pub(crate) fn stream<J: Send, R: Send>(
    py: Python<'_>,
    threads: usize,
    mut next: impl FnMut() -> PyResult<Option<J>>,
    cells: impl Fn(&J) -> usize,
    work: impl Fn(J, &Interrupt) -> Result<R> + Send + Sync,
    mut take: impl FnMut(R) -> PyResult<()>,
) -> PyResult<()> {
    let Some(first) = next()? else { return Ok(()) };
    let second = next()?;
    if second.is_none() && cells(&first) < SMALL {
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
    // The lock is held by the worker that waits, no longer, and waiting does not panic.
    let wait = || queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
    let worker = |results: Sender<_>| {
        while let Ok((number, job)) = wait() {
            let result = catch_unwind(AssertUnwindSafe(|| work(job, &interrupt)));
            // If nobody listens any more, the queue will end, too.
            results.send((number, result)).ok();
        }
    };
    scope(|scope| {
        let (mut made, mut taken, mut workers, mut more) = (0, 0, 0, true);
        // Of the jobs from `taken` to `made`.
        let mut cells_under_way = VecDeque::new();
        let mut waiting = BTreeMap::new();
        let mut go_on = || {
            while more || taken < made {
                py.check_signals()?;
                let under_way: usize = cells_under_way.iter().sum();
                if more && (under_way < threads * AHEAD || made - taken < threads) {
                    match next()? {
                        Some(job) => {
                            cells_under_way.push_back(cells(&job));
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
                    cells_under_way.pop_front();
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

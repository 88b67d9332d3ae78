//! Long work: without the GIL, on threads of its own, while the calling thread listens for Ctrl-C.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, available_parallelism, scope};
use std::time::Duration;

use being_vl_core::{Interrupt, Result, memory};
use pyo3::prelude::*;

use crate::errors::{BeingVLError, to_python};

/// Time between two looks at signals.
const TICK: Duration = Duration::from_millis(50);

/// Cells copied ahead of those that are encoded, for each thread: enough work for the time in which another Python
/// thread has the GIL.
const CELLS_AHEAD: usize = 1 << 19;

/// With fewer cells, encoding is over before a thread would have started.
pub(crate) const MIN_THREAD_CELLS: usize = 1 << 16;

/// The error if the system gives no thread.
fn start_error(threads: usize, error: &std::io::Error) -> PyErr {
    to_python(&memory::thread_error(threads, error))
}

/// The error if a thread panicked.
fn panic_error() -> PyErr {
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
            // The channel is closed when the worker ends.
            let (sender, receiver) = channel::<()>();
            let worker = || {
                let _sender = sender;
                work(&interrupt)
            };
            let worker =
                Builder::new().spawn_scoped(scope, worker).map_err(|error| start_error(1, &error))?;
            let mut signal = None;
            while receiver.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                if signal.is_none() {
                    signal = Python::attach(|py| py.check_signals().and_then(|()| on_tick(py))).err();
                    if signal.is_some() {
                        interrupt.set();
                    }
                }
            }
            let result = worker.join();
            match (signal, result) {
                (Some(error), _) => Err(error),
                (None, Ok(result)) => result.map_err(|error| to_python(&error)),
                (None, Err(_)) => Err(panic_error()),
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
    let Some(first_job) = next()? else { return Ok(()) };
    let second_job = next()?;
    if second_job.is_none() && cells(&first_job) < MIN_THREAD_CELLS {
        let result = py.detach(|| work(first_job, &Interrupt::default()));
        return take(result.map_err(|error| to_python(&error))?);
    }
    let mut first_jobs = [Some(first_job), second_job].into_iter().flatten();
    let next = || first_jobs.next().map_or_else(&mut next, |job| Ok(Some(job)));
    let threads = match threads {
        0 => available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    stream_on_threads(py, threads, next, cells, work, take)
}

/// The jobs whose results have not been taken.
struct OpenJobs<R> {
    num_jobs: usize,
    num_results: usize,
    /// Per open job, its number of cells.
    cells: VecDeque<usize>,
    /// Results that came before those of earlier jobs.
    early_results: BTreeMap<usize, R>,
}

impl<R> OpenJobs<R> {
    fn new() -> Self {
        Self { num_jobs: 0, num_results: 0, cells: VecDeque::new(), early_results: BTreeMap::new() }
    }

    fn is_empty(&self) -> bool {
        self.num_results == self.num_jobs
    }

    /// Whether `threads` threads should get one more job.
    fn has_room(&self, threads: usize) -> bool {
        self.cells.iter().sum::<usize>() < threads * CELLS_AHEAD || self.num_jobs - self.num_results < threads
    }

    /// Adds a job and returns its number.
    fn add(&mut self, cells: usize) -> usize {
        self.cells.push_back(cells);
        self.num_jobs += 1;
        self.num_jobs - 1
    }

    /// The result of the job that is next in order, if it has come.
    fn take_next(&mut self) -> Option<R> {
        let result = self.early_results.remove(&self.num_results)?;
        self.cells.pop_front();
        self.num_results += 1;
        Some(result)
    }
}

fn stream_on_threads<J: Send, R: Send>(
    py: Python<'_>,
    threads: usize,
    mut next: impl FnMut() -> PyResult<Option<J>>,
    cells: impl Fn(&J) -> usize,
    work: impl Fn(J, &Interrupt) -> Result<R> + Send + Sync,
    mut take: impl FnMut(R) -> PyResult<()>,
) -> PyResult<()> {
    let interrupt = Interrupt::default();
    let (jobs, queue) = channel::<(usize, J)>();
    let (sender, mut results) = channel();
    let queue = Mutex::new(queue);
    // Only the worker that waits holds the lock, and waiting does not panic.
    let wait = || queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
    let worker = |results: Sender<_>| {
        while let Ok((number, job)) = wait() {
            let result = catch_unwind(AssertUnwindSafe(|| work(job, &interrupt)));
            // Fails if the calling thread has stopped; then the queue ends, too.
            results.send((number, result)).ok();
        }
    };
    scope(|scope| {
        let (mut open_jobs, mut num_workers, mut has_next) = (OpenJobs::new(), 0, true);
        let mut run = || {
            while has_next || !open_jobs.is_empty() {
                py.check_signals()?;
                if has_next && open_jobs.has_room(threads) {
                    // Make a job, and start a worker for it if there are fewer than threads.
                    match next()? {
                        Some(job) => {
                            let number = open_jobs.add(cells(&job));
                            jobs.send((number, job)).map_err(|_| panic_error())?;
                        }
                        None => has_next = false,
                    }
                    if num_workers < threads.min(open_jobs.num_jobs) {
                        let results = sender.clone();
                        let start = Builder::new().spawn_scoped(scope, || worker(results));
                        start.map_err(|error| start_error(threads, &error))?;
                        num_workers += 1;
                    }
                } else {
                    // Enough is under way: wait for a result.
                    let results = &mut results;
                    if let Ok((number, result)) = py.detach(move || results.recv_timeout(TICK)) {
                        open_jobs.early_results.insert(number, result);
                    }
                }
                while let Some(result) = open_jobs.take_next() {
                    take(result.map_err(|_| panic_error())?.map_err(|error| to_python(&error))?)?;
                }
            }
            Ok(())
        };
        let result = run().inspect_err(|_: &PyErr| interrupt.set());
        // The workers end with the queue.
        drop(jobs);
        result
    })
}

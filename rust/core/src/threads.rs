//! Worker threads for as long as one call lasts.
//!
//! A pool does not survive `fork`, so none is kept between calls and one thread needs none.

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::Result;
use crate::memory::{check_stacks, thread_error};

/// The threads of one call.
pub(crate) struct Threads(Option<ThreadPool>);

impl Threads {
    /// Starts this many threads; 0 means one per core. One thread is the calling thread itself.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        if threads == 1 {
            return Ok(Self(None));
        }
        check_stacks(threads)?;
        let start = ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = start.map_err(|error| thread_error(threads, &error))?;
        Ok(Self(Some(pool)))
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.0.as_ref().map_or(1, ThreadPool::current_num_threads)
    }

    /// The pool, if there is more than one thread.
    pub fn pool(&self) -> Option<&ThreadPool> {
        self.0.as_ref()
    }

    /// Calls `work` for every item, on all threads if `is_parallel`, and returns the results in order, or an error.
    pub fn map<T: Send, R: Send>(
        &self,
        items: &mut [T],
        is_parallel: bool,
        work: impl Fn(&mut T) -> Result<R> + Sync + Send,
    ) -> Result<Vec<R>> {
        match &self.0 {
            Some(pool) if is_parallel => pool.install(|| items.par_iter_mut().map(work).collect()),
            _ => items.iter_mut().map(work).collect(),
        }
    }
}

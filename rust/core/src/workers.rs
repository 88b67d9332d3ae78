//! Worker threads that keep to their own items, for jobs that come thousands of times a second.
//!
//! A pool's threads fall asleep between such jobs, and waking one takes longer than most of these jobs. As any thread
//! of a pool takes any item, items also move from one core's cache to another's. These threads stay awake for a moment
//! after each job, and work on the same items each time. Only if a thread does not come to its items, perhaps because
//! another program has its core, the calling thread works on them.
//!
//! The first error of a job is that of all jobs: after it no work is done any more.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory::{self, thread_error};

/// How long a waiting thread stays awake: waking one takes tens of microseconds, in a virtual machine more.
const SPIN_TIME: Duration = Duration::from_micros(200);

/// How often it checks before it gives way to threads that wait for its core.
const CHECKS_PER_YIELD: usize = 500;

type Work<T> = dyn Fn(&mut T) -> Result<()> + Send + Sync;

/// What all threads are to do.
struct Job<T> {
    /// Jobs are numbered from 1.
    number: usize,
    /// None ends the threads.
    work: Option<Arc<Work<T>>>,
    /// The thread that waits for the job, if one does.
    caller: Option<Thread>,
}

/// An item in cache lines of its own, since other threads write to its neighbours. Some processors load two lines at a
/// time.
#[repr(align(128))]
struct Item<T> {
    /// The last job that a thread has begun on it.
    last_job: AtomicUsize,
    content: Mutex<T>,
}

struct SharedState<T> {
    items: Vec<Item<T>>,
    job: Mutex<Job<T>>,
    /// Number of the last job.
    last_job: AtomicUsize,
    /// On how many items the last job that is waited for is not finished.
    num_unfinished: AtomicUsize,
    has_failed: AtomicBool,
    /// The first error of a job.
    error: Mutex<Option<Error>>,
}

/// Items, and threads that work on them.
pub(crate) struct Workers<T: Send + 'static> {
    shared: Arc<SharedState<T>>,
    num_threads: usize,
    handles: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static> Workers<T> {
    /// For this many threads, the calling one among them; none is started yet.
    pub fn new(contents: Vec<T>, threads: usize) -> Result<Self> {
        let num_threads = threads.min(contents.len());
        let item = |content| Item { last_job: AtomicUsize::new(0), content: Mutex::new(content) };
        let shared = SharedState {
            items: memory::collect(contents.into_iter().map(item), "the parts of the grids")?,
            job: Mutex::new(Job { number: 0, work: None, caller: None }),
            last_job: AtomicUsize::new(0),
            num_unfinished: AtomicUsize::new(0),
            has_failed: AtomicBool::new(false),
            error: Mutex::new(None),
        };
        Ok(Self { shared: Arc::new(shared), num_threads, handles: Vec::new() })
    }

    /// Starts the threads. Before that, and after [`Workers::stop`], the calling thread does all work.
    pub fn start(&mut self) -> Result<()> {
        let (threads, last_job) = (self.num_threads, self.shared.last_job.load(Ordering::Acquire));
        memory::check_stacks(threads.saturating_sub(1))?;
        for number in 1..threads {
            let shared = self.shared.clone();
            let start = thread::Builder::new().spawn(move || shared.run_worker(number, threads, last_job));
            let handle = start.map_err(|error| thread_error(threads, &error))?;
            self.handles.push(handle);
        }
        Ok(())
    }

    /// Ends the threads.
    pub fn stop(&mut self) {
        self.publish(None, None);
        for handle in self.handles.drain(..) {
            // If it panicked, its item is poisoned, and the next lock of the item panics.
            let _ = handle.join();
        }
    }

    /// Gives the threads a job and returns its number.
    fn publish(&self, work: Option<Arc<Work<T>>>, caller: Option<Thread>) -> usize {
        let SharedState { items, job, last_job, num_unfinished, .. } = &*self.shared;
        let mut job = lock(job);
        if caller.is_some() {
            num_unfinished.store(items.len(), Ordering::Relaxed);
        }
        *job = Job { number: job.number + 1, work, caller };
        // Threads that are awake see the number; the others are woken.
        last_job.store(job.number, Ordering::Release);
        let number = job.number;
        drop(job);
        self.handles.iter().for_each(|handle| handle.thread().unpark());
        number
    }

    /// Calls `work` for every item, on all threads if `is_parallel`, and waits for it. Fails if this job or one before
    /// it has failed for any item.
    pub fn for_each(
        &self,
        is_parallel: bool,
        work: impl Fn(&mut T) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        if !is_parallel || self.handles.is_empty() {
            self.shared.items.iter().for_each(|item| self.shared.work(item, &work));
            return self.check();
        }
        let work: Arc<Work<T>> = Arc::new(work);
        let (caller, shared) = (thread::current(), &*self.shared);
        let number = self.publish(Some(work.clone()), Some(caller));
        // First this thread's own items, then those that no other thread has begun.
        let items_of_caller = shared.items.iter().step_by(self.num_threads);
        for item in items_of_caller.chain(&shared.items) {
            item.begin(number, &*work, shared, || shared.finish_item());
        }
        wait(|| shared.num_unfinished.load(Ordering::Acquire) == 0);
        // Panics if another thread has panicked.
        drop(self.lock_all());
        self.check()
    }

    /// Fails if any job has failed.
    fn check(&self) -> Result<()> {
        if !self.shared.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        lock(&self.shared.error).clone().map_or(Ok(()), Err)
    }

    /// Lets the other threads call `work` for their items while the calling thread goes on. Nobody waits for it: if the
    /// next job comes first, it may not be called at all.
    pub fn run_in_background(&self, work: impl Fn(&mut T) -> Result<()> + Send + Sync + 'static) {
        if !self.handles.is_empty() {
            self.publish(Some(Arc::new(work)), None);
        }
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.shared.items.len()
    }

    /// Locks all items.
    pub fn lock_all(&self) -> Vec<MutexGuard<'_, T>> {
        self.shared.items.iter().map(|item| lock(&item.content)).collect()
    }

    /// Locks one item.
    pub fn lock(&self, index: usize) -> MutexGuard<'_, T> {
        lock(&self.shared.items[index].content)
    }
}

impl<T: Send + 'static> Drop for Workers<T> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<T> Item<T> {
    /// Works on it, unless a thread has begun to do so for this job, and then calls `finish`, even if the work panics.
    fn begin(&self, job: usize, work: &Work<T>, shared: &SharedState<T>, finish: impl Fn()) {
        if self.last_job.fetch_max(job, Ordering::Relaxed) < job {
            let _finish = OnDrop(finish);
            shared.work(self, work);
        }
    }
}

impl<T> SharedState<T> {
    /// Notes that the last job is finished on one more item.
    fn finish_item(&self) {
        self.num_unfinished.fetch_sub(1, Ordering::Release);
    }

    /// Works on an item, unless a job has failed.
    fn work(&self, item: &Item<T>, work: &Work<T>) {
        if self.has_failed.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = work(&mut lock(&item.content)) {
            lock(&self.error).get_or_insert(error);
            self.has_failed.store(true, Ordering::Release);
        }
    }

    /// Runs one of the threads: works on its items for each job after `last_job`.
    fn run_worker(&self, thread: usize, threads: usize, mut last_job: usize) {
        loop {
            wait(|| self.last_job.load(Ordering::Acquire) != last_job);
            // Copy the job, so that the lock is held for a moment only.
            let (work, caller);
            {
                let job = lock(&self.job);
                last_job = job.number;
                caller = job.caller.clone();
                work = match &job.work {
                    Some(work) => work.clone(),
                    None => return,
                };
            }
            for item in self.items.iter().skip(thread).step_by(threads) {
                item.begin(last_job, &*work, self, || {
                    if let Some(caller) = &caller {
                        self.finish_item();
                        caller.unpark();
                    }
                });
            }
        }
    }
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panicked")
}

/// Waits until `is_ready`, at first awake; after that, the thread that makes it ready must unpark this one.
fn wait(is_ready: impl Fn() -> bool) {
    let since = Instant::now();
    while since.elapsed() < SPIN_TIME {
        for _ in 0..CHECKS_PER_YIELD {
            if is_ready() {
                return;
            }
            std::hint::spin_loop();
        }
        thread::yield_now();
    }
    while !is_ready() {
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn every_job_is_done_once_on_every_item() {
        for (items, threads) in [(1, 1), (2, 2), (3, 2), (2, 5), (7, 3)] {
            let mut workers = Workers::new(vec![(Vec::new(), Vec::new()); items], threads).unwrap();
            let jobs = 3000;
            for job in 0..jobs {
                if job % 1000 == 0 {
                    workers.stop();
                    workers.start().unwrap();
                }
                // Sometimes the others are asleep by then.
                if job % 500 == 0 {
                    thread::sleep(std::time::Duration::from_millis(1));
                }
                let add_job = move |(jobs, _): &mut (Vec<_>, Vec<_>)| {
                    jobs.push(job);
                    Ok(())
                };
                workers.for_each(job % 3 != 0, add_job).unwrap();
                if job % 7 == 0 {
                    workers.run_in_background(move |(_, background_jobs)| {
                        background_jobs.push(job);
                        Ok(())
                    });
                }
            }
            workers.stop();
            for item in workers.lock_all() {
                let (jobs_of_item, background_jobs) = &*item;
                assert!(jobs_of_item.iter().copied().eq(0..jobs));
                assert!(background_jobs.is_sorted_by(|one, next| one < next));
            }
        }
    }

    #[test]
    fn a_panic_of_any_thread_reaches_the_caller() {
        for number in 0..3 {
            let mut workers = Workers::new(vec![0, 1, 2], 3).unwrap();
            workers.start().unwrap();
            let work = move |item: &mut i32| {
                assert!(*item != number, "on purpose");
                Ok(())
            };
            assert!(catch_unwind(AssertUnwindSafe(|| workers.for_each(true, work))).is_err());
        }
    }

    #[test]
    fn an_error_of_any_thread_reaches_the_caller_and_ends_all_work() {
        let error = Error::Memory { bytes: 7, purpose: "a test" };
        for (number, threads, in_background) in [(0, 1, false), (0, 3, false), (2, 3, false), (1, 3, true)] {
            let mut workers = Workers::new(vec![(0, 0), (1, 0), (2, 0)], threads).unwrap();
            workers.start().unwrap();
            let failure = error.clone();
            let work =
                move |item: &mut (i32, i32)| if item.0 == number { Err(failure.clone()) } else { Ok(()) };
            if in_background {
                workers.run_in_background(work);
                while workers.check().is_ok() {
                    thread::yield_now();
                }
            } else {
                assert_eq!(workers.for_each(true, work), Err(error.clone()));
            }
            let count = |item: &mut (i32, i32)| {
                item.1 += 1;
                Ok(())
            };
            assert_eq!(workers.for_each(true, count), Err(error.clone()));
            assert!(workers.lock_all().iter().all(|item| item.1 == 0));
        }
    }
}

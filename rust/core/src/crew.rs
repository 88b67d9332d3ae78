//! Threads that keep to their own items, for jobs that come thousands of times a second.
//!
//! A pool's threads fall asleep between such jobs, and waking one takes longer than most jobs do; and as any of them takes
//! any item, items wander from one core's cache to another's. These threads stay awake for a moment, and item `i` is
//! always worked on by the same one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};

use crate::error::{Error, Result};

/// Looks without a pause, then looks with giving way to other programs in between, before a thread falls asleep.
const LOOKS: [u32; 2] = [2000, 100];

type Work<T> = dyn Fn(&mut T) + Send + Sync;

/// What all workers are to do.
enum Job<T> {
    /// Work on their items, and then wake this thread.
    Work(Arc<Work<T>>, Thread),
    Stop,
}

struct Shared<T> {
    items: Vec<Mutex<T>>,
    job: Mutex<Job<T>>,
    /// Number of jobs handed out so far.
    jobs: AtomicUsize,
    /// Number of workers that are not done with the last one.
    busy: AtomicUsize,
}

impl<T> Shared<T> {
    /// Works on the items of one of `threads` threads.
    fn work(&self, thread: usize, threads: usize, work: &Work<T>) {
        self.items.iter().skip(thread).step_by(threads).for_each(|item| work(&mut lock(item)));
    }
}

/// Items, and threads that work on them.
pub(crate) struct Crew<T: Send + 'static> {
    shared: Arc<Shared<T>>,
    threads: usize,
    workers: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static> Crew<T> {
    /// For this many threads, the calling one among them; none is started yet.
    pub fn new(items: Vec<T>, threads: usize) -> Self {
        let items: Vec<_> = items.into_iter().map(Mutex::new).collect();
        let threads = threads.min(items.len());
        let shared =
            Shared { items, job: Mutex::new(Job::Stop), jobs: AtomicUsize::new(0), busy: AtomicUsize::new(0) };
        Self { shared: Arc::new(shared), threads, workers: Vec::new() }
    }

    /// Starts the threads. Until then, and after [`Crew::stop`], the calling thread does all work.
    pub fn start(&mut self) -> Result<()> {
        let (threads, jobs) = (self.threads, self.shared.jobs.load(Ordering::Acquire));
        for number in 1..threads {
            let shared = self.shared.clone();
            let start = thread::Builder::new().spawn(move || serve(&shared, number, threads, jobs));
            let worker = start.map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
            self.workers.push(worker);
        }
        Ok(())
    }

    /// Ends the threads.
    pub fn stop(&mut self) {
        self.hand_out(Job::Stop);
        for worker in self.workers.drain(..) {
            // If it panicked, its item is poisoned.
            let _ = worker.join();
        }
    }

    fn hand_out(&self, job: Job<T>) {
        *lock(&self.shared.job) = job;
        self.shared.busy.store(self.workers.len(), Ordering::Relaxed);
        self.shared.jobs.fetch_add(1, Ordering::Release);
        self.workers.iter().for_each(|worker| worker.thread().unpark());
    }

    /// Calls `work` for every item, on all threads if it is `worthwhile`.
    pub fn each(&self, worthwhile: bool, work: impl Fn(&mut T) + Send + Sync + 'static) {
        if !worthwhile || self.workers.is_empty() {
            return self.shared.work(0, 1, &work);
        }
        let work: Arc<Work<T>> = Arc::new(work);
        self.hand_out(Job::Work(work.clone(), thread::current()));
        self.shared.work(0, self.threads, &*work);
        wait(|| self.shared.busy.load(Ordering::Acquire) == 0);
        assert!(!self.shared.items.iter().any(Mutex::is_poisoned), "a thread panicked");
    }

    /// The items, locked.
    pub fn items(&self) -> Vec<MutexGuard<'_, T>> {
        self.shared.items.iter().map(lock).collect()
    }

    /// One item, locked.
    pub fn item(&self, index: usize) -> MutexGuard<'_, T> {
        lock(&self.shared.items[index])
    }
}

impl<T: Send + 'static> Drop for Crew<T> {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panicked")
}

/// What a worker does, `jobs` having been handed out so far.
fn serve<T>(shared: &Shared<T>, number: usize, threads: usize, mut jobs: usize) {
    loop {
        wait(|| shared.jobs.load(Ordering::Acquire) != jobs);
        jobs = jobs.wrapping_add(1);
        let (work, caller) = match &*lock(&shared.job) {
            Job::Work(work, caller) => (work.clone(), caller.clone()),
            Job::Stop => return,
        };
        let _done = Done { busy: &shared.busy, caller };
        shared.work(number, threads, &*work);
    }
}

/// Says that a worker is done, also if it panics.
struct Done<'a> {
    busy: &'a AtomicUsize,
    caller: Thread,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.busy.fetch_sub(1, Ordering::Release);
        self.caller.unpark();
    }
}

/// Waits until `ready`, at first awake. Whoever makes it ready must unpark this thread.
fn wait(ready: impl Fn() -> bool) {
    for _ in 0..LOOKS[0] {
        if ready() {
            return;
        }
        std::hint::spin_loop();
    }
    for _ in 0..LOOKS[1] {
        if ready() {
            return;
        }
        thread::yield_now();
    }
    while !ready() {
        thread::park();
    }
}

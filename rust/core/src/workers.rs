//! Threads that keep to their own items, for jobs that come thousands of times a second.
//!
//! A pool's threads fall asleep between such jobs, and waking one takes longer than most of these jobs do; and as any
//! thread takes any item, items wander from one core's cache to another's. These threads stay awake for a moment after
//! each job, and work on the same items each time. Only items that their thread does not come to, perhaps because
//! another program has its core, are taken over by the calling thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a waiting thread stays awake: waking one takes tens of microseconds, in a virtual machine more.
const AWAKE: Duration = Duration::from_micros(200);

/// How often it looks before it gives way to threads that wait for its core.
const LOOKS: usize = 500;

type Work<T> = dyn Fn(&mut T) + Send + Sync;

/// What all threads are to do.
struct Job<T> {
    /// Counts up.
    number: usize,
    /// None ends the threads.
    work: Option<Arc<Work<T>>>,
    /// Who waits for it, if anybody does.
    caller: Option<Thread>,
}

/// In cache lines of its own, of which some processors fetch two at a time: neighbours are written by other threads.
#[repr(align(128))]
struct Item<T> {
    /// The last job for which a thread has taken it.
    job: AtomicUsize,
    content: Mutex<T>,
}

struct Shared<T> {
    items: Vec<Item<T>>,
    job: Mutex<Job<T>>,
    /// Number of the last job.
    last: AtomicUsize,
    /// Number of items on which the last job that is waited for is not done.
    open: AtomicUsize,
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
        let threads = threads.min(items.len());
        let item = |content| Item { job: AtomicUsize::new(0), content: Mutex::new(content) };
        let shared = Shared {
            items: items.into_iter().map(item).collect(),
            job: Mutex::new(Job { number: 0, work: None, caller: None }),
            last: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
        };
        Self { shared: Arc::new(shared), threads, workers: Vec::new() }
    }

    /// Starts the threads. Before that, and after [`Crew::stop`], the calling thread does all work.
    pub fn start(&mut self) -> Result<()> {
        let (threads, last) = (self.threads, self.shared.last.load(Ordering::Acquire));
        for number in 1..threads {
            let shared = self.shared.clone();
            let start = thread::Builder::new().spawn(move || shared.serve(number, threads, last));
            let worker = start.map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
            self.workers.push(worker);
        }
        Ok(())
    }

    /// Ends the threads.
    pub fn stop(&mut self) {
        self.hand_out(None, None);
        for worker in self.workers.drain(..) {
            // If it panicked, its item is poisoned, which says so.
            let _ = worker.join();
        }
    }

    fn hand_out(&self, work: Option<Arc<Work<T>>>, caller: Option<Thread>) -> usize {
        let Shared { items, job, last, open } = &*self.shared;
        let mut job = lock(job);
        if caller.is_some() {
            open.store(items.len(), Ordering::Relaxed);
        }
        *job = Job { number: job.number + 1, work, caller };
        last.store(job.number, Ordering::Release);
        let number = job.number;
        drop(job);
        self.workers.iter().for_each(|worker| worker.thread().unpark());
        number
    }

    /// Calls `work` for every item, on all threads if it is `worthwhile`.
    pub fn each(&self, worthwhile: bool, work: impl Fn(&mut T) + Send + Sync + 'static) {
        if !worthwhile || self.workers.is_empty() {
            return self.shared.items.iter().for_each(|item| work(&mut lock(&item.content)));
        }
        let work: Arc<Work<T>> = Arc::new(work);
        let (caller, shared) = (thread::current(), &*self.shared);
        let number = self.hand_out(Some(work.clone()), Some(caller));
        let own = shared.items.iter().step_by(self.threads);
        for item in own.chain(&shared.items) {
            item.work(number, &*work, || shared.close());
        }
        wait(|| shared.open.load(Ordering::Acquire) == 0);
        // Fails if another thread has panicked.
        drop(self.items());
    }

    /// Has the other threads call `work` for their items while the calling thread goes on. Nobody waits for it: it may come
    /// after the next job, or never if that comes first.
    pub fn meanwhile(&self, work: impl Fn(&mut T) + Send + Sync + 'static) {
        if !self.workers.is_empty() {
            self.hand_out(Some(Arc::new(work)), None);
        }
    }

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.shared.items.len()
    }

    /// The items, locked.
    pub fn items(&self) -> Vec<MutexGuard<'_, T>> {
        self.shared.items.iter().map(|item| lock(&item.content)).collect()
    }

    /// One item, locked.
    pub fn item(&self, index: usize) -> MutexGuard<'_, T> {
        lock(&self.shared.items[index].content)
    }
}

impl<T: Send + 'static> Drop for Crew<T> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<T> Item<T> {
    /// Works on it, unless a thread already has for this job, and says when it is `done`, even if that panics.
    fn work(&self, job: usize, work: &Work<T>, done: impl Fn()) {
        if self.job.fetch_max(job, Ordering::Relaxed) < job {
            let _done = OnDrop(done);
            work(&mut lock(&self.content));
        }
    }
}

impl<T> Shared<T> {
    /// Says that the last job is done on one more item.
    fn close(&self) {
        self.open.fetch_sub(1, Ordering::Release);
    }

    /// What one of the threads does after job `last`.
    fn serve(&self, thread: usize, threads: usize, mut last: usize) {
        loop {
            wait(|| self.last.load(Ordering::Acquire) != last);
            let (work, caller);
            {
                let job = lock(&self.job);
                last = job.number;
                caller = job.caller.clone();
                work = match &job.work {
                    Some(work) => work.clone(),
                    None => return,
                };
            }
            for item in self.items.iter().skip(thread).step_by(threads) {
                item.work(last, &*work, || {
                    if let Some(caller) = &caller {
                        self.close();
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

/// Waits until `ready`, at first awake. Whoever makes it ready then unparks this thread.
fn wait(ready: impl Fn() -> bool) {
    let since = Instant::now();
    while since.elapsed() < AWAKE {
        for _ in 0..LOOKS {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        thread::yield_now();
    }
    while !ready() {
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
            let mut crew = Crew::new(vec![(Vec::new(), Vec::new()); items], threads);
            let jobs = 3000;
            for job in 0..jobs {
                if job % 1000 == 0 {
                    crew.stop();
                    crew.start().unwrap();
                }
                // Sometimes the others are asleep by then.
                if job % 500 == 0 {
                    thread::sleep(std::time::Duration::from_millis(1));
                }
                crew.each(job % 3 != 0, move |(done, _)| done.push(job));
                if job % 7 == 0 {
                    crew.meanwhile(move |(_, meanwhile)| meanwhile.push(job));
                }
            }
            crew.stop();
            for item in crew.items() {
                let (done, meanwhile) = &*item;
                assert!(done.iter().copied().eq(0..jobs));
                assert!(meanwhile.is_sorted_by(|one, next| one < next));
            }
        }
    }

    #[test]
    fn a_panic_of_any_thread_reaches_the_caller() {
        for bad in 0..3 {
            let mut crew = Crew::new(vec![0, 1, 2], 3);
            crew.start().unwrap();
            let work = move |item: &mut i32| assert!(*item != bad, "on purpose");
            assert!(catch_unwind(AssertUnwindSafe(|| crew.each(true, work))).is_err());
        }
    }
}

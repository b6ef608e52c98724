//! Threads that share out numbered tasks.

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Some threads. Which one runs a task, and when, must not matter to the tasks' results.
pub trait Team: Sync {
    /// How many threads there are, the caller's included.
    fn threads(&self) -> usize;

    /// Runs `task(0)` to `task(tasks - 1)`, each once, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// The caller's thread alone.
#[derive(Clone, Copy, Debug)]
pub struct Serial;

impl Team for Serial {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// Threads of our own.
#[derive(Debug)]
pub struct OwnThreads(ThreadPool);

impl OwnThreads {
    /// A pool of so many threads; None where the system refuses them.
    #[must_use]
    pub fn new(threads: usize) -> Option<Self> {
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("sedac-kernel-{i}"));
        pool.build().ok().map(Self)
    }
}

impl Team for OwnThreads {
    fn threads(&self) -> usize {
        self.0.current_num_threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let next = std::sync::atomic::AtomicUsize::new(0);
        self.0.broadcast(|_| drain(&next, tasks, task));
    }
}

/// Takes tasks until none is left; what each thread of a team does.
pub fn drain(next: &std::sync::atomic::AtomicUsize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    loop {
        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if i >= tasks {
            return;
        }
        task(i);
    }
}

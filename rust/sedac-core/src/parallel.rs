//! Threads for large batches: a private rayon pool that survives `fork`.

use std::sync::{Arc, Mutex};

use rayon::{
    iter::{ParallelBridge, ParallelIterator},
    ThreadPool, ThreadPoolBuilder,
};

/// Tokens that one task takes: about 18 us of work in a step.
pub(crate) const CHUNK: usize = 8 * 1024;

/// Token-steps (tokens x checkpoints) from which threads are tried.
///
/// Measured by `cargo bench -p sedac-core` with this set to 1, under `RAYON_NUM_THREADS=1` and `=2`, on two cores of an
/// AMD EPYC that were busy with other work: using the pool costs 14 us, a step 2.2 ns per token, a batch with its
/// ratios 3.4 ns per token-step (fastest tenth of the runs). By arithmetic two *free* cores then break even near 13,000
/// tokens of a step. On busy cores threads gained nothing at any size and at times lost, so they start well above
/// that, where a step takes 140 us. Free cores have not been measured.
pub(crate) const PARALLEL_FROM: usize = 64 * 1024;

/// The pool, and the process that its threads live in.
///
/// A forked child (a data loader's worker) inherits this variable but not the threads, and would wait for them for
/// ever; so the process is compared on every use. A forked child that finds the lock taken by a thread that it does
/// not have works serially, which gives the same answer.
static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);

/// Runs `work` on every item, on several threads where `token_steps` is large enough for that to pay.
pub(crate) fn for_each<I>(items: I, token_steps: usize, work: impl Fn(I::Item) + Send + Sync)
where
    I: Iterator + Send,
    I::Item: Send,
{
    match (token_steps >= PARALLEL_FROM).then(pool).flatten() {
        Some(pool) => pool.install(|| items.par_bridge().for_each(work)),
        None => items.for_each(work),
    }
}

fn pool() -> Option<Arc<ThreadPool>> {
    let process = std::process::id();
    let mut kept = POOL.try_lock().ok()?;
    if let Some((owner, pool)) = kept.take() {
        if owner == process {
            *kept = Some((owner, Arc::clone(&pool)));
            return (pool.current_num_threads() > 1).then_some(pool);
        }
        // Dropping it would signal threads that do not exist in this process.
        std::mem::forget(pool);
    }
    let pool = ThreadPoolBuilder::new().thread_name(|i| format!("sedac-{i}")).build().ok()?;
    let pool = Arc::new(pool);
    *kept = Some((process, Arc::clone(&pool)));
    (pool.current_num_threads() > 1).then_some(pool)
}

//! Teams that run tasks in an order nobody would expect.

use std::sync::{
    atomic::{AtomicUsize, Ordering},
    OnceLock,
};

use sedac_kernels::{OwnThreads, Serial, Team};

use crate::numbers::Random;

/// The last task first.
pub(crate) struct Backwards(pub(crate) usize);

impl Team for Backwards {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).rev().for_each(task);
    }
}

/// Any order, each task on a thread of its own.
pub(crate) struct Shuffled {
    pub(crate) threads: usize,
    pub(crate) seed: u64,
}

impl Team for Shuffled {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let mut order: Vec<_> = (0..tasks).collect();
        let mut random = Random(self.seed);
        for last in (1..tasks).rev() {
            order.swap(last, random.next() as usize % (last + 1));
        }
        for &i in &order {
            std::thread::scope(|scope| {
                scope.spawn(|| task(i));
            });
        }
    }
}

/// Every team but the caller's thread alone.
pub(crate) fn teams() -> &'static [Box<dyn Team + Send>] {
    static TEAMS: OnceLock<Vec<Box<dyn Team + Send>>> = OnceLock::new();
    TEAMS.get_or_init(|| {
        let mut teams: Vec<Box<dyn Team + Send>> = Vec::new();
        for threads in [2, 3, 5] {
            teams.push(Box::new(OwnThreads::new(threads).expect("a few threads")));
        }
        teams.push(Box::new(Backwards(3)));
        teams.push(Box::new(Backwards(40)));
        teams.push(Box::new(Shuffled { threads: 7, seed: 1 }));
        teams
    })
}

#[test]
fn a_team_runs_each_task_once() {
    let serial: Box<dyn Team + Send> = Box::new(Serial);
    for team in teams().iter().chain([&serial]) {
        for tasks in [0, 1, 2, 5, 33] {
            let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            team.run(tasks, &|i| {
                runs[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }
}

#[test]
fn own_threads_are_as_many_as_asked_for() {
    assert_eq!(OwnThreads::new(3).expect("a few threads").threads(), 3);
    assert_eq!(Serial.threads(), 1);
}

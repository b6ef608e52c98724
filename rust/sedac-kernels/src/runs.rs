//! In what order the units of a block are taken: some from each of several runs of memory in turn.
//!
//! A core reads several runs that lie far apart faster than one, or than rows that are neighbours. On an AMD EPYC
//! (Zen 3, two threads, rows of 1,792 bytes in bf16) a linear map takes 1.8 times as long with four neighbours at a time
//! as with rows of four runs, a whole FFN 1.3 times as long (two builds in turn, by hand). So a block is seen as [`RUNS`]
//! runs of equal length, and its units come as the first of each run, the second of each run, and so on; the order of
//! those that are needed is the same whichever others are.

/// Runs of a block; 4 were not faster.
pub(crate) const RUNS: usize = 2;

/// One block of units.
#[derive(Clone, Copy)]
pub(crate) struct Runs {
    /// Its first unit.
    pub(crate) from: usize,
    /// Units of each run; the last ones may end early.
    pub(crate) length: usize,
    /// One past its last unit.
    pub(crate) to: usize,
}

impl Runs {
    /// Unit `at` of run `r`; there is none if it is `to` or more.
    #[inline(always)]
    pub(crate) fn unit(self, at: usize, r: usize) -> usize {
        self.from + r * self.length + at
    }
}

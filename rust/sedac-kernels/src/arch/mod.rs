//! Instruction sets: one small vocabulary of vector operations, which the kernels are written in once.
//!
//! A value of a type here is a proof that the machine has the instructions: [`Isa::detect`] makes it. Kernels are
//! [`Kernel`]s, generic over [`Simd`] and always inlined into a function that switches the instructions on.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};

use self::portable::Portable;

/// Units that the shadow's codes are interleaved by.
pub(crate) const LANE_UNITS: usize = 16;
/// Elements that share one scale of the shadow.
pub(crate) const GROUP: usize = 64;
/// Bytes of the codes of [`LANE_UNITS`] units in one group.
pub(crate) const GROUP_BYTES: usize = LANE_UNITS * GROUP / 2;

/// Vector operations on `f32` lanes.
///
/// # Safety
///
/// Loads and stores touch `LANES` elements from `at` on and do not check that they are there: checks in the inner loops
/// were what those loops spent most of their instructions on.
#[allow(unsafe_code)]
pub(crate) trait Simd: Copy {
    type F32s: Copy;
    /// `bf16` numbers of two rows: each 32-bit lane has the first row's in its lower half.
    type Pairs: Copy;
    const LANES: usize;
    /// Running sums that fit the registers, next to what they are made of.
    const SUMS: usize;

    fn splat(self, value: f32) -> Self::F32s;
    unsafe fn load(self, from: &[f32], at: usize) -> Self::F32s;
    unsafe fn load_bf16(self, from: &[bf16], at: usize) -> Self::F32s;
    unsafe fn load_f16(self, from: &[f16], at: usize) -> Self::F32s;
    unsafe fn store(self, value: Self::F32s, to: &mut [f32], at: usize);
    /// `a * b + c`; rounded once where the machine can.
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s;
    /// Sum over the lanes of `a` and `b`.
    fn sum(self, a: Self::F32s, b: Self::F32s) -> f32;

    /// Sum over the lanes of each; the order of additions does not depend on how many there are.
    #[inline(always)]
    fn totals<const R: usize, const N: usize>(self, sums: [[Self::F32s; N]; R]) -> [[f32; N]; R] {
        let mut totals = [[0.0; N]; R];
        // Plain loops: through closures the running sums would be kept in memory.
        for r in 0..R {
            for n in 0..N {
                totals[r][n] = self.sum(sums[r][n], self.splat(0.0));
            }
        }
        totals
    }

    /// Stores the lanes at the start of `to`.
    #[inline(always)]
    fn put(self, value: Self::F32s, to: &mut [f32]) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: they are there.
        unsafe { self.store(value, to, 0) }
    }

    /// Asks for the cache line at `from[at]` to be brought near (to the second-level cache); `at` may be past the end.
    #[inline(always)]
    fn prefetch<T>(self, from: &[T], at: usize) {
        let _ = (from, at);
    }

    /// Products of `R` rows with `N` inputs in `bf16`, where the machine has such an instruction.
    #[inline(always)]
    fn dots_bf16<const R: usize, const N: usize, const P: usize>(
        self,
        rows: [&[bf16]; R],
        inputs: [&[bf16]; N],
        ahead: [&[bf16]; P],
    ) -> Option<[[f32; N]; R]> {
        let _ = (rows, inputs, ahead);
        None
    }

    /// Elements `at..` of two rows.
    fn pairs(self, first: &[bf16], second: &[bf16], at: usize) -> Self::Pairs;
    /// `sum + first * by[0] + second * by[1]`, lane by lane.
    fn add_pairs(self, pairs: Self::Pairs, by: [bf16; 2], sum: Self::F32s) -> Self::F32s;

    /// `sum over g of scale[g][u] * (corrections[g] + sum over i of code[g][u][i] * x[g][i])` for the 16 units of each
    /// of `R` blocks, codes 0..=15; see [`crate::shadow`] for the layout.
    fn block_products<const R: usize>(self, blocks: &Blocks<'_, R>) -> [[f32; LANE_UNITS]; R];
}

/// Blocks of a shadow, and the activations that they meet; all slices have one entry per group.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a, const R: usize> {
    pub(crate) codes: [&'a [[u8; GROUP_BYTES]]; R],
    pub(crate) scales: [&'a [[bf16; LANE_UNITS]]; R],
    pub(crate) x: &'a [[i8; GROUP]],
    pub(crate) corrections: &'a [i32],
}

/// Work that is written for any instruction set; mark `run` `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(x86::Avx512<true>),
}

impl Isa {
    /// The best one.
    #[must_use]
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// All of them, best first; the last is plain Rust.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(x86::Avx512::<true>::detect().map(Set::Avx512Bf16));
            found.extend(x86::Avx512::<false>::detect().map(Set::Avx512));
            found.extend(x86::Avx2::detect().map(Set::Avx2));
        }
        found.push(Set::Portable);
        found.into_iter().map(Self).collect()
    }

    /// A short name: `avx512-bf16`, `avx512`, `avx2` or `portable`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16(_) => "avx512-bf16",
        }
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Set::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16(simd) => simd.run_bf16(kernel),
        }
    }
}

//! AVX-512 with VNNI, as Ice Lake and Zen 4 machines and later have it; some have bf16 products.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{
    super::{Blocks, Kernel, Simd, GROUP, GROUP_BYTES, LANE_UNITS},
    four, prefetch_line,
};

/// `BF16`: with bf16 products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && (!BF16 || is_x86_feature_detected!("avx512bf16"));
        found.then_some(Self(()))
    }
}

impl Avx512<false> {
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn with<K: Kernel>(simd: Avx512<false>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves the features.
        unsafe { with(self, kernel) }
    }
}

impl Avx512<true> {
    #[inline]
    pub(crate) fn run_bf16<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
        fn with<K: Kernel>(simd: Avx512<true>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves the features.
        unsafe { with(self, kernel) }
    }
}

/// Adds elements `k..k + 32 * LINES` of the products to the sums.
///
/// # Safety
///
/// The machine has bf16 products, and every row and input has these elements.
#[inline(always)]
unsafe fn add_dots_bf16<const R: usize, const N: usize, const P: usize, const LINES: usize>(
    rows: [&[bf16]; R],
    inputs: [&[bf16]; N],
    ahead: [&[bf16]; P],
    k: usize,
    sums: &mut [[__m512; N]; R],
) {
    // SAFETY: the caller's. Any 64 bytes are a `__m512bh`: 32 bf16 numbers.
    unsafe {
        let load = |from: &[bf16], line: usize| -> __m512bh {
            std::mem::transmute(_mm512_loadu_si512(from.as_ptr().add(k + 32 * line).cast()))
        };
        let zero: __m512bh = std::mem::transmute(_mm512_setzero_si512());
        let mut loaded = [[zero; LINES]; R];
        for r in 0..R {
            // With one input, with every row again: a core whose queue of misses is full drops a request (asking once, a
            // whole FFN of 896 x 4864 took 5 to 10% longer; into the first-level cache, 20%).
            if r == 0 || N == 1 {
                for next in ahead {
                    for line in 0..LINES {
                        prefetch_line(next, k + 32 * line);
                    }
                }
            }
            for line in 0..LINES {
                loaded[r][line] = load(rows[r], line);
            }
        }
        for n in 0..N {
            for line in 0..LINES {
                let input = load(inputs[n], line);
                for r in 0..R {
                    sums[r][n] = _mm512_dpbf16_ps(sums[r][n], loaded[r][line], input);
                }
            }
        }
    }
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type F32s = __m512;
    type Pairs = __m512i;
    const LANES: usize = 16;
    const SUMS: usize = 24;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(self, from: &[f32], at: usize) -> __m512 {
        // SAFETY: the caller has LANES elements there; `self` proves the instruction.
        unsafe { _mm512_loadu_ps(from.as_ptr().add(at)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: &[bf16], at: usize) -> __m512 {
        // SAFETY: the caller has LANES elements there, which is what the load takes; `self` proves the instructions.
        unsafe {
            let halves = _mm256_loadu_si256(from.as_ptr().add(at).cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: &[f16], at: usize) -> __m512 {
        // SAFETY: the caller has LANES elements there, which is what the load takes; `self` proves the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().add(at).cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, value: __m512, to: &mut [f32], at: usize) {
        // SAFETY: the caller has LANES elements there; `self` proves the instruction.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().add(at), value) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, a: __m512, b: __m512) -> f32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let all = _mm512_add_ps(a, b);
            let eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn totals<const R: usize, const N: usize>(self, sums: [[__m512; N]; R]) -> [[f32; N]; R] {
        let mut totals = [[0.0; N]; R];
        if R * N < 8 {
            for r in 0..R {
                for n in 0..N {
                    totals[r][n] = self.sum(sums[r][n], self.splat(0.0));
                }
            }
            return totals;
        }
        // By sixteens, each pair of lanes that `sum` adds, in its order, for several sums at once. Plain loops: through
        // closures the running sums would be kept in memory.
        let mut from = 0;
        while from < R * N {
            let mut level = [self.splat(0.0); 16];
            for i in 0..16 {
                if from + i < R * N {
                    level[i] = sums[(from + i) / N][(from + i) % N];
                }
            }
            let mut kept = [0.0; 16];
            // SAFETY: `self` proves the instructions; `kept` has 16 elements.
            unsafe {
                for i in 0..8 {
                    let (a, b) = (level[2 * i], level[2 * i + 1]);
                    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                    level[i] = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
                }
                for i in 0..4 {
                    let (a, b) = (level[2 * i], level[2 * i + 1]);
                    let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                    level[i] = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b));
                }
                for i in 0..2 {
                    let (a, b) = (level[2 * i], level[2 * i + 1]);
                    let low = _mm512_shuffle_ps::<0b01_00_01_00>(a, b);
                    level[i] = _mm512_add_ps(low, _mm512_shuffle_ps::<0b11_10_11_10>(a, b));
                }
                let (a, b) = (level[0], level[1]);
                let low = _mm512_shuffle_ps::<0b10_00_10_00>(a, b);
                _mm512_storeu_ps(
                    kept.as_mut_ptr(),
                    _mm512_add_ps(low, _mm512_shuffle_ps::<0b11_01_11_01>(a, b)),
                );
            }
            for i in 0..16 {
                if from + i < R * N {
                    // Fours of sums went to the four quarters of a vector.
                    totals[(from + i) / N][(from + i) % N] = kept[4 * (i % 4) + i / 4];
                }
            }
            from += 16;
        }
        totals
    }

    #[inline(always)]
    fn prefetch<T>(self, from: &[T], at: usize) {
        prefetch_line(from, at);
    }

    #[inline(always)]
    fn dots_bf16<const R: usize, const N: usize, const P: usize>(
        self,
        rows: [&[bf16]; R],
        inputs: [&[bf16]; N],
        ahead: [&[bf16]; P],
    ) -> Option<[[f32; N]; R]> {
        if !BF16 {
            return None;
        }
        let d = inputs[0].len();
        let whole = d / 32 * 32;
        assert!(rows.iter().chain(&inputs).all(|each| each.len() >= d));
        let mut sums = [[self.splat(0.0); N]; R];
        let mut k = 0;
        while N == 1 && k + 64 <= whole {
            // SAFETY: k + 64 <= whole <= d, which every row and input has (asserted above); `BF16` proves the products.
            unsafe { add_dots_bf16::<R, N, P, 2>(rows, inputs, ahead, k, &mut sums) };
            k += 64;
        }
        while k < whole {
            // SAFETY: the same for k + 32.
            unsafe { add_dots_bf16::<R, N, P, 1>(rows, inputs, ahead, k, &mut sums) };
            k += 32;
        }
        let mut products = self.totals(sums);
        if whole < d {
            for (row, products) in rows.iter().zip(&mut products) {
                for (input, product) in inputs.iter().zip(products) {
                    let rest = row[whole..d].iter().zip(&input[whole..]);
                    *product += rest.map(|(w, x)| w.to_f32() * x.to_f32()).sum::<f32>();
                }
            }
        }
        Some(products)
    }

    #[inline(always)]
    fn pairs(self, first: &[bf16], second: &[bf16], at: usize) -> __m512i {
        let (first, second) = (&first[at..at + 16], &second[at..at + 16]);
        // SAFETY: `self` proves the instructions, and each has 16 elements.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first.as_ptr().cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second.as_ptr().cast()));
            _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
        }
    }

    #[inline(always)]
    fn add_pairs(self, pairs: __m512i, by: [bf16; 2], sum: __m512) -> __m512 {
        if BF16 {
            let both = u32::from(by[0].to_bits()) | u32::from(by[1].to_bits()) << 16;
            // SAFETY: `self` with `BF16` proves the instructions. Any 64 bytes are a `__m512bh`: 32 bf16 numbers.
            return unsafe {
                let pairs: __m512bh = std::mem::transmute(pairs);
                let both: __m512bh = std::mem::transmute(_mm512_set1_epi32(both.cast_signed()));
                _mm512_dpbf16_ps(sum, pairs, both)
            };
        }
        // SAFETY: `self` proves the instructions.
        let (low, high) = unsafe {
            let high = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff));
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high))
        };
        self.mul_add(high, self.splat(by[1].to_f32()), self.mul_add(low, self.splat(by[0].to_f32()), sum))
    }

    #[inline(always)]
    fn block_products<const R: usize>(self, blocks: &Blocks<'_, R>) -> [[f32; LANE_UNITS]; R] {
        let mut products = [[0.0; LANE_UNITS]; R];
        // SAFETY: `self` proves the instructions; codes are read through slices of 64 bytes, and there are 16 scales and
        // products.
        unsafe {
            let nibble = _mm512_set1_epi8(15);
            let mut z = [_mm512_setzero_ps(); R];
            for (g, (x, &correction)) in blocks.x.iter().zip(blocks.corrections).enumerate() {
                let (mut a, mut b) = ([_mm512_set1_epi32(correction); R], [_mm512_setzero_si512(); R]);
                for quad in 0..GROUP / 8 {
                    let low = _mm512_set1_epi32(four(x, quad));
                    let high = _mm512_set1_epi32(four(x, GROUP / 8 + quad));
                    for (r, codes) in blocks.codes.iter().enumerate() {
                        let of_group = &codes[g];
                        let bytes = _mm512_loadu_si512(of_group[64 * quad..64 * quad + 64].as_ptr().cast());
                        // The next block's: the hardware's own prefetching reaches less far.
                        prefetch_line(of_group, 64 * quad + codes.len() * GROUP_BYTES);
                        a[r] = _mm512_dpbusd_epi32(a[r], _mm512_and_si512(bytes, nibble), low);
                        let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
                        b[r] = _mm512_dpbusd_epi32(b[r], upper, high);
                    }
                }
                for (r, scales) in blocks.scales.iter().enumerate() {
                    let sums = _mm512_cvtepi32_ps(_mm512_add_epi32(a[r], b[r]));
                    z[r] = _mm512_fmadd_ps(sums, self.load_bf16(&scales[g], 0), z[r]);
                }
            }
            for (products, z) in products.iter_mut().zip(z) {
                self.store(z, products, 0);
            }
        }
        products
    }
}

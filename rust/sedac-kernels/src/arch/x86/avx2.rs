//! AVX2 with FMA and F16C.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{
    super::{Blocks, Kernel, Simd, GROUP, GROUP_BYTES, LANE_UNITS},
    four, prefetch_line,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves the features.
        unsafe { with(self, kernel) }
    }
}

impl Simd for Avx2 {
    type F32s = __m256;
    type Pairs = __m256i;
    const LANES: usize = 8;
    const SUMS: usize = 12;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(self, from: &[f32], at: usize) -> __m256 {
        // SAFETY: the caller has LANES elements there; `self` proves the instruction.
        unsafe { _mm256_loadu_ps(from.as_ptr().add(at)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: &[bf16], at: usize) -> __m256 {
        // SAFETY: the caller has LANES elements there, which is what the load takes; `self` proves the instructions.
        unsafe {
            let halves = _mm_loadu_si128(from.as_ptr().add(at).cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: &[f16], at: usize) -> __m256 {
        // SAFETY: the caller has LANES elements there, which is what the load takes; `self` proves the instructions.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(at).cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, value: __m256, to: &mut [f32], at: usize) {
        // SAFETY: the caller has LANES elements there; `self` proves the instruction.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr().add(at), value) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, a: __m256, b: __m256) -> f32 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let both = _mm256_add_ps(a, b);
            let four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn prefetch<T>(self, from: &[T], at: usize) {
        prefetch_line(from, at);
    }

    #[inline(always)]
    fn pairs(self, first: &[bf16], second: &[bf16], at: usize) -> __m256i {
        let (first, second) = (&first[at..at + 8], &second[at..at + 8]);
        // SAFETY: `self` proves the instructions, and each has 8 elements.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(first.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(second.as_ptr().cast()));
            _mm256_or_si256(low, _mm256_slli_epi32::<16>(high))
        }
    }

    #[inline(always)]
    fn add_pairs(self, pairs: __m256i, by: [bf16; 2], sum: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        let (low, high) = unsafe {
            let high = _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(high))
        };
        self.mul_add(high, self.splat(by[1].to_f32()), self.mul_add(low, self.splat(by[0].to_f32()), sum))
    }

    #[inline(always)]
    fn block_products<const R: usize>(self, blocks: &Blocks<'_, R>) -> [[f32; LANE_UNITS]; R] {
        let mut products = [[0.0; LANE_UNITS]; R];
        // SAFETY: `self` proves the instructions; codes are read through slices of 32 bytes, the 16 scales and products
        // in two halves of 8.
        unsafe {
            let (nibble, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
            let mut z = [[_mm256_setzero_ps(); 2]; R];
            for (g, (x, &correction)) in blocks.x.iter().zip(blocks.corrections).enumerate() {
                let mut sums = [[_mm256_set1_epi32(correction); 2]; R];
                for quad in 0..GROUP / 8 {
                    let low = _mm256_set1_epi32(four(x, quad));
                    let high = _mm256_set1_epi32(four(x, GROUP / 8 + quad));
                    for (codes, sums) in blocks.codes.iter().zip(&mut sums) {
                        let of_group = &codes[g];
                        prefetch_line(of_group, quad * 4 * LANE_UNITS + codes.len() * GROUP_BYTES);
                        for (half, sum) in sums.iter_mut().enumerate() {
                            let at = quad * 4 * LANE_UNITS + half * 32;
                            let bytes = _mm256_loadu_si256(of_group[at..at + 32].as_ptr().cast());
                            // Codes are at most 15, so that two products fit 16 bits.
                            let a = _mm256_maddubs_epi16(_mm256_and_si256(bytes, nibble), low);
                            let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                            let b = _mm256_maddubs_epi16(upper, high);
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
                        }
                    }
                }
                for ((z, sums), scales) in z.iter_mut().zip(sums).zip(blocks.scales) {
                    for half in 0..2 {
                        let scales = self.load_bf16(&scales[g], 8 * half);
                        z[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scales, z[half]);
                    }
                }
            }
            for (products, z) in products.iter_mut().zip(z) {
                for half in 0..2 {
                    self.store(z[half], products, 8 * half);
                }
            }
        }
        products
    }
}

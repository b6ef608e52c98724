//! Plain Rust, shaped so that compilers use what vector registers the target always has (SSE2, NEON).

#![allow(unsafe_code)]

use half::{bf16, f16};

use super::{Blocks, Simd, GROUP, LANE_UNITS};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn lanes(of: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(of)
}

impl Simd for Portable {
    type F32s = [f32; LANES];
    type Pairs = [u32; LANES];
    const LANES: usize = LANES;
    const SUMS: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32s {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: &[f32], at: usize) -> Self::F32s {
        // SAFETY: the caller's.
        let from = unsafe { from.get_unchecked(at..at + LANES) };
        lanes(|i| from[i])
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: &[bf16], at: usize) -> Self::F32s {
        // SAFETY: the caller's.
        let from = unsafe { from.get_unchecked(at..at + LANES) };
        lanes(|i| f32::from_bits(u32::from(from[i].to_bits()) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: &[f16], at: usize) -> Self::F32s {
        // SAFETY: the caller's.
        let from = unsafe { from.get_unchecked(at..at + LANES) };
        lanes(|i| from[i].to_f32())
    }

    #[inline(always)]
    unsafe fn store(self, value: Self::F32s, to: &mut [f32], at: usize) {
        // SAFETY: the caller's.
        unsafe { to.get_unchecked_mut(at..at + LANES) }.copy_from_slice(&value);
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s {
        // Two roundings: without hardware for one, `f32::mul_add` is a slow library call.
        lanes(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn sum(self, a: Self::F32s, b: Self::F32s) -> f32 {
        let mut sums = lanes(|i| a[i] + b[i]);
        for width in [4, 2, 1] {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
        }
        sums[0]
    }

    #[inline(always)]
    fn pairs(self, first: &[bf16], second: &[bf16], at: usize) -> Self::Pairs {
        std::array::from_fn(|i| {
            u32::from(first[at + i].to_bits()) | u32::from(second[at + i].to_bits()) << 16
        })
    }

    #[inline(always)]
    fn add_pairs(self, pairs: Self::Pairs, by: [bf16; 2], sum: Self::F32s) -> Self::F32s {
        let (low, high) =
            (lanes(|i| f32::from_bits(pairs[i] << 16)), lanes(|i| f32::from_bits(pairs[i] & !0xffff)));
        self.mul_add(high, self.splat(by[1].to_f32()), self.mul_add(low, self.splat(by[0].to_f32()), sum))
    }

    #[inline(always)]
    fn block_products<const R: usize>(self, blocks: &Blocks<'_, R>) -> [[f32; LANE_UNITS]; R] {
        let mut products = [[0.0; LANE_UNITS]; R];
        for ((codes, scales), products) in blocks.codes.into_iter().zip(blocks.scales).zip(&mut products) {
            let groups = codes.iter().zip(scales).zip(blocks.x).zip(blocks.corrections);
            for (((codes, scales), x), &correction) in groups {
                let mut sums = [correction; LANE_UNITS];
                for (quad, codes) in codes.chunks_exact(4 * LANE_UNITS).enumerate() {
                    for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(4)) {
                        for (i, &code) in codes.iter().enumerate() {
                            let (low, high) =
                                (i32::from(x[4 * quad + i]), i32::from(x[GROUP / 2 + 4 * quad + i]));
                            *sum += i32::from(code & 15) * low + i32::from(code >> 4) * high;
                        }
                    }
                }
                for ((product, sum), scale) in products.iter_mut().zip(sums).zip(scales) {
                    *product += sum as f32 * scale.to_f32();
                }
            }
        }
        products
    }
}

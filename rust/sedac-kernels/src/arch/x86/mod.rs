//! The instruction sets of x86-64 machines.
//!
//! Every intrinsic below is reached through a value of [`Avx2`] or [`Avx512`], which exists only where `detect` has
//! found the instructions: "`self` proves" them.
//!
//! Measured on an AMD EPYC (Zen 4), one FFN of 896 x 4864 in bf16, a quarter of the units read: bringing the rows of
//! the next step to the *second*-level cache while this one computes takes a third off the time; to the first-level
//! cache, or past all of them, it gains half of that.

#![allow(unsafe_code)]

mod avx2;
mod avx512;

use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T1};

use super::GROUP;

pub(crate) use self::{avx2::Avx2, avx512::Avx512};

#[inline(always)]
fn prefetch_line<T>(from: &[T], at: usize) {
    // SAFETY: SSE is part of every x86-64 machine, and a prefetch of any address is harmless.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(from.as_ptr().wrapping_add(at).cast()) }
}

/// Four activations as the bytes of one number.
#[inline(always)]
fn four(x: &[i8; GROUP], quad: usize) -> i32 {
    let at = 4 * quad;
    i32::from_le_bytes([x[at], x[at + 1], x[at + 2], x[at + 3]].map(i8::cast_unsigned))
}

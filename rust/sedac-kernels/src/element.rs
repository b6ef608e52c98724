//! The element types of weights and activations.

use half::{bf16, f16};

use crate::arch::Simd;

/// A floating type that weights are kept in; arithmetic is in `f32`.
pub trait Element: Copy + Send + Sync + private::Sealed + 'static {
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

/// How each instruction set loads a type; kept out of the public trait, which nobody else can implement.
#[allow(private_bounds, private_interfaces, unsafe_code)]
pub(crate) mod private {
    use super::{bf16, f16, Simd};

    /// Loads [`Simd::LANES`] elements from `from[at..]` as `f32` lanes.
    pub trait Sealed: Sized {
        ///
        /// # Safety
        ///
        /// They must be there.
        #[doc(hidden)]
        unsafe fn load<S: Simd>(simd: S, from: &[Self], at: usize) -> S::F32s;
        /// The elements as `bf16`, where that is what they are.
        #[doc(hidden)]
        #[inline(always)]
        fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
            None
        }
    }

    impl Sealed for f32 {
        #[inline(always)]
        unsafe fn load<S: Simd>(simd: S, from: &[Self], at: usize) -> S::F32s {
            // SAFETY: the caller's.
            unsafe { simd.load(from, at) }
        }
    }

    impl Sealed for bf16 {
        #[inline(always)]
        unsafe fn load<S: Simd>(simd: S, from: &[Self], at: usize) -> S::F32s {
            // SAFETY: the caller's.
            unsafe { simd.load_bf16(from, at) }
        }
        #[inline(always)]
        fn as_bf16(elements: &[Self]) -> Option<&[bf16]> {
            Some(elements)
        }
    }

    impl Sealed for f16 {
        #[inline(always)]
        unsafe fn load<S: Simd>(simd: S, from: &[Self], at: usize) -> S::F32s {
            // SAFETY: the caller's.
            unsafe { simd.load_f16(from, at) }
        }
    }
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

macro_rules! half_element {
    ($type:ty) => {
        impl Element for $type {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                <$type>::to_f32(self)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                <$type>::from_f32(value)
            }
        }
    };
}

half_element!(bf16);
half_element!(f16);

//! Element types, random numbers and matrices.

use half::{bf16, f16};
use sedac_kernels::{Element, Matrix};

/// What the tests must know about an element type.
pub(crate) trait Float: Element {
    /// Largest relative error of a rounding.
    const ROUNDING: f64;
    /// Largest error of rounding a number so small that the relative one does not hold.
    const SMALLEST: f64;

    fn exact(self) -> f64 {
        f64::from(self.to_f32())
    }

    /// Equal for equal bits, and for any two NaN.
    fn bits(self) -> u32 {
        let value = self.to_f32();
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    }
}

impl Float for f32 {
    const ROUNDING: f64 = 1.0 / (1 << 24) as f64;
    const SMALLEST: f64 = 1e-36;
}

impl Float for bf16 {
    const ROUNDING: f64 = 1.0 / (1 << 8) as f64;
    const SMALLEST: f64 = 1e-36;
}

impl Float for f16 {
    const ROUNDING: f64 = 1.0 / (1 << 11) as f64;
    const SMALLEST: f64 = 1.0 / (1 << 25) as f64;
}

/// Numbers without a pattern (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -1..1.
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn values<T: Element>(&mut self, count: usize, size: f32) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.uniform() * size)).collect()
    }
}

/// A matrix whose memory ends with its last row, and has NaN between the rows.
#[derive(Debug)]
pub(crate) struct Strided<T> {
    pub(crate) data: Vec<T>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
}

impl<T: Float> Strided<T> {
    pub(crate) fn random(rows: usize, columns: usize, gap: usize, size: f32, random: &mut Random) -> Self {
        let stride = columns + gap;
        let length = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
        let value = |i| if i % stride < columns { random.uniform() * size } else { f32::NAN };
        Self { data: (0..length).map(value).map(T::from_f32).collect(), rows, columns, stride }
    }

    pub(crate) fn at(&self, row: usize, column: usize) -> f64 {
        assert!(column < self.columns);
        self.data[row * self.stride + column].exact()
    }

    pub(crate) fn matrix(&self) -> Matrix<'_, T> {
        Matrix::new(&self.data, self.rows, self.columns, self.stride).expect("rows that fit")
    }
}

//! `cargo bench -p sedac-kernels`: one FFN of 896 x 4864 for one row, and what reading the same memory costs.
//!
//! The rows of a group are: all units; a quarter of them, chosen by importance; a plain read of the bytes that the
//! quarter needs. On one thread: what teams add is timed from Python, where they share torch's threads.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use half::bf16;
use sedac_kernels::{ffn, read, Activation, Down, Element, Ffn, Isa, Matrix, Point, Serial, Shadow};

const UNITS: usize = 4864;
const HIDDEN_SIZE: usize = 896;

/// Numbers in -0.5..0.5, without a generator's crate: a Weyl sequence.
fn values<T: Element>(n: usize, from: usize) -> Vec<T> {
    (from..from + n).map(|i| T::from_f32((i as f32 * 0.618_034).fract() - 0.5)).collect()
}

fn bench<T: Element>(criterion: &mut Criterion, dtype: &str) {
    let (f, d) = (UNITS, HIDDEN_SIZE);
    let weights: Vec<_> = (0..3).map(|i| values::<T>(f * d, i)).collect();
    let [gate, up, down] = [0, 1, 2].map(|i| Matrix::contiguous(&weights[i], f, d).expect("fits"));
    let ffn_weights = Ffn {
        gate: Some(gate),
        up,
        down: Down::Columns(down),
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        activation: Activation::Silu,
    };
    let codes: Vec<u8> = (0..f * d / 2).map(|i| (i * 97 + i / 251) as u8).collect();
    let scales = vec![bf16::from_f32(0.01); f * d / 64];
    let norms: Vec<f32> = (0..f).map(|i| 1.0 + (i as f32 * 0.618_034).fract()).collect();
    let shadow = Shadow::new(&codes, &scales, None, &norms, d).expect("fits");
    let x = values::<T>(d, 7);
    let mut y = x.clone();
    let mut run = |isa: Isa, point: Point| {
        ffn(isa, &Serial, &ffn_weights, Some(shadow), &[point], black_box(&x), &mut y, None).expect("fits")
    };

    // The threshold that a quarter of the units reach, by bisection.
    let (mut low, mut high) = (0.0_f32, 1e6);
    for _ in 0..60 {
        let middle = f32::midpoint(low, high);
        let used = run(Isa::detect(), Point { width: f, importance_min: middle });
        *(if used.read > f / 4 { &mut low } else { &mut high }) = middle;
    }
    let quarter = Point { width: f, importance_min: high };
    let whole = Point { width: f, importance_min: 0.0 };

    let isas = Isa::available();
    for isa in [isas[0], isas[isas.len() - 1]] {
        let mut group = criterion.benchmark_group(format!("ffn/{dtype}/{}", isa.name()));
        for (name, point) in [("all", whole), ("quarter", quarter)] {
            let of_shadow = if point.importance_min > 0.0 { codes.len() + 2 * scales.len() } else { 0 };
            let bytes = run(isa, point).read * 3 * d * size_of::<T>() + of_shadow;
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(name, |b| b.iter(|| run(isa, point)));
            let memory = vec![1.0_f32; bytes / 4];
            let reads = format!("{name}-read");
            group.bench_function(reads, |b| b.iter(|| read(isa, &Serial, black_box(&memory))));
        }
        group.finish();
    }
}

fn main() {
    let short = std::time::Duration::from_millis(500);
    let criterion = Criterion::default().sample_size(20).warm_up_time(short).measurement_time(2 * short);
    let mut criterion = criterion.configure_from_args();
    bench::<f32>(&mut criterion, "f32");
    bench::<bf16>(&mut criterion, "bf16");
    criterion.final_summary();
}

//! `cargo bench -p sedac-core`: cost per step, per batch and per plan, from one token to a million.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use sedac_core::{CascadeConfig, CascadeController, LayerConfig};

const SIZES: [usize; 6] = [1, 1_000, 30_000, 100_000, 300_000, 1_000_000];

fn controller() -> CascadeController {
    let layers = [(3, 0.2, 0.8, 0.3), (6, 0.5, 1.0, 0.4), (9, 0.8, 1.2, 0.3)];
    let layers =
        layers.map(|(layer, target, threshold, weight)| LayerConfig::new(layer, target, threshold, weight));
    CascadeController::new(CascadeConfig::new(layers.to_vec()).expect("the default cascade is valid"))
}

/// Risks in 0..1.5, without a generator's crate: a Weyl sequence.
fn risks(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.618_034).fract() * 1.5).collect()
}

fn bench(c: &mut Criterion) {
    let controller = controller();
    let mut group = c.benchmark_group("controller");
    for n in SIZES {
        let risk = risks(3 * n);
        group.throughput(Throughput::Elements(n as u64));
        group.bench_with_input(BenchmarkId::new("evaluate_batch", n), &n, |b, &n| {
            b.iter(|| controller.evaluate_batch(black_box(&risk), n).expect("valid"));
        });
        group.bench_with_input(BenchmarkId::new("step", n), &n, |b, &n| {
            let pass = controller.begin(n).expect("valid");
            b.iter_batched_ref(
                || pass.clone(),
                |pass| controller.step(pass, 0, black_box(&risk[..n])).expect("valid"),
                criterion::BatchSize::LargeInput,
            );
        });
        let levels = controller.evaluate_batch(&risk, n).expect("valid").levels;
        group.bench_with_input(BenchmarkId::new("plan", n), &n, |b, &n| {
            b.iter(|| controller.plan(black_box(&levels[..n])).expect("valid"));
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    bench(&mut criterion);
    criterion.final_summary();
}

//! What must hold for every risk and every cascade.

use proptest::prelude::*;
use sedac_core::{CascadeConfig, CascadeController, Error, LayerConfig, LevelPlan, THRESHOLD_FLOOR};

/// Ordinary risks, and every kind of f32 that a broken probe could give.
fn risk() -> impl Strategy<Value = f32> {
    prop_oneof![3 => 0.0_f32..3.0, 1 => any::<f32>(), 1 => any::<u32>().prop_map(f32::from_bits)]
}

fn config() -> impl Strategy<Value = CascadeConfig> {
    let layer = (-2.0_f32..1.5, THRESHOLD_FLOOR..4.0_f32, 0.0_f32..2.0);
    (prop::collection::vec(layer, 1..5), 0.0_f32..=1.0, any::<bool>(), 2_u8..=64).prop_map(
        |(layers, decay, soft_exit, n_levels)| {
            let layers = (2..).zip(layers).map(|(layer_idx, (target, threshold, weight))| {
                LayerConfig::new(layer_idx * 3, target, threshold, weight)
            });
            let config = CascadeConfig::new(layers.collect()).unwrap().with_soft_exit(soft_exit);
            config.with_confidence_decay(decay).unwrap().with_n_levels(n_levels).unwrap()
        },
    )
}

/// A cascade, and risks for up to 40 tokens of it, checkpoint after checkpoint.
fn batch() -> impl Strategy<Value = (CascadeConfig, Vec<f32>, usize)> {
    (config(), 0_usize..40).prop_flat_map(|(config, n_tokens)| {
        let risks = prop::collection::vec(risk(), n_tokens * config.n_checkpoints());
        (Just(config), risks, Just(n_tokens))
    })
}

proptest! {
    #[test]
    fn stepping_is_evaluating((config, risk, n_tokens) in batch()) {
        let controller = CascadeController::new(config);
        let decisions = controller.evaluate_batch(&risk, n_tokens).unwrap();
        let mut pass = controller.begin(n_tokens).unwrap();
        for i in 0..controller.config().n_checkpoints() {
            let row = i * n_tokens..(i + 1) * n_tokens;
            let levels = controller.step(&mut pass, i, &risk[row.clone()]).unwrap();
            prop_assert_eq!(&levels[..], &decisions.levels[row.clone()]);
            prop_assert_eq!(&pass.ratio()[..], &decisions.ratios[row]);
        }
        prop_assert_eq!(pass.exited(), decisions.should_exit);
        prop_assert_eq!(pass.confidence(), decisions.accumulated_confidence);
    }

    #[test]
    fn a_level_never_skips_more_than_the_ratio((config, risk, n_tokens) in batch()) {
        let n_levels = config.keep_levels().n_levels();
        let decisions = CascadeController::new(config.clone()).evaluate_batch(&risk, n_tokens).unwrap();
        for (&level, &ratio) in decisions.levels.iter().zip(&decisions.ratios) {
            let skipped = 1.0 - f32::from(level) / f32::from(n_levels);
            prop_assert!(skipped <= ratio + 1e-6, "level {} of {} at ratio {}", level, n_levels, ratio);
            prop_assert!(level > 0 || !config.soft_exit());
        }
    }

    #[test]
    fn a_failed_token_stays_whole((config, risk, n_tokens) in batch()) {
        let n_levels = config.keep_levels().n_levels();
        let decisions = CascadeController::new(config).evaluate_batch(&risk, n_tokens).unwrap();
        for token in 0..n_tokens {
            let mut failed = false;
            for place in (token..risk.len()).step_by(n_tokens) {
                failed |= !risk[place].is_finite();
                prop_assert!(!failed || (decisions.levels[place], decisions.ratios[place]) == (n_levels, 0.0));
            }
            prop_assert!(decisions.accumulated_confidence[token].is_finite());
        }
    }

    #[test]
    fn less_risk_never_keeps_more((config, low, high) in (config(), 0.0_f32..4.0, 0.0_f32..4.0)) {
        let (low, high) = (low.min(high), low.max(high));
        let risk = [low, high].repeat(config.n_checkpoints());
        let decisions = CascadeController::new(config).evaluate_batch(&risk, 2).unwrap();
        for levels in decisions.levels.chunks(2) {
            prop_assert!(levels[0] <= levels[1]);
        }
    }

    #[test]
    fn a_plan_sorts_and_counts(levels in prop::collection::vec(0_u8..=8, 0..200)) {
        let plan = LevelPlan::new(&levels, 8).unwrap();
        let mut expected: Vec<usize> = (0..levels.len()).collect();
        expected.sort_by_key(|&token| std::cmp::Reverse(levels[token]));
        prop_assert!(plan.order.iter().map(|&token| usize::try_from(token).unwrap()).eq(expected));
        for (bound, &count) in plan.at_least.iter().enumerate() {
            prop_assert_eq!(usize::try_from(count).unwrap(), levels.iter().filter(|&&level| usize::from(level) >= bound).count());
        }
    }

    #[test]
    fn an_update_stays_between_threshold_and_samples(
        samples in prop::collection::vec(risk(), 0..50), q in 0.0_f64..=1.0, alpha in 0.0_f32..=1.0,
    ) {
        let config = CascadeConfig::new(vec![LayerConfig::new(1, 0.5, 0.7, 1.0)]).unwrap();
        let controller = CascadeController::new(config.with_alpha(alpha).unwrap());
        let after = controller.update_threshold(0, &samples, Some(q)).unwrap();
        let finite = samples.iter().copied().filter(|sample| sample.is_finite()).chain([0.7]);
        let (low, high) = finite.fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(x), high.max(x)));
        prop_assert!(after >= THRESHOLD_FLOOR);
        prop_assert!(after >= low - low.abs() * 1e-6 && after <= (high + high.abs() * 1e-6).max(THRESHOLD_FLOOR));
    }
}

#[test]
fn threads_agree_with_one_thread_and_with_small_batches() {
    let layers = [(3, 0.2, 0.8, 0.3), (6, 0.5, 1.0, 0.4)].map(|(i, t, th, w)| LayerConfig::new(i, t, th, w));
    let controller = CascadeController::new(CascadeConfig::new(layers.to_vec()).unwrap());
    let n_tokens = 300_001; // above the size where threads start, and no multiple of a chunk
    let risk: Vec<f32> = (0..2 * n_tokens).map(|i| (i as f32 * 0.618_034).fract() * 1.5).collect();
    let whole = controller.evaluate_batch(&risk, n_tokens).unwrap();
    for token in (0..n_tokens).step_by(997).chain([n_tokens - 1]) {
        let alone = controller.evaluate_batch(&[risk[token], risk[n_tokens + token]], 1).unwrap();
        assert_eq!(whole.get(token), alone.get(0));
        assert_eq!([whole.levels[token], whole.levels[n_tokens + token]], alone.levels[..]);
    }
}

#[test]
fn no_concurrent_update_is_lost() {
    let controller = || {
        let config = CascadeConfig::new(vec![LayerConfig::new(1, 0.5, 1.0, 1.0)]).unwrap();
        CascadeController::new(config.with_alpha(1e-4).unwrap())
    };
    // Every update is the same function of the threshold, so any order gives the same value, and a lost one shows.
    let (shared, alone) = (controller(), controller());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..5_000).for_each(|_| drop(shared.update_threshold(0, &[0.25], None))));
        }
    });
    for _ in 0..20_000 {
        alone.update_threshold(0, &[0.25], None).unwrap();
    }
    assert_eq!(shared.thresholds(), alone.thresholds());
}

#[test]
fn what_is_wrong_is_named() {
    let layer = LayerConfig::new(3, 0.2, 0.8, 0.3);
    let refused = |layers: Vec<LayerConfig>| CascadeConfig::new(layers).unwrap_err().to_string();
    assert_eq!(refused(vec![]), "`layer_configs` must hold at least one checkpoint, got none");
    assert_eq!(
        refused(vec![layer, layer]),
        "`layer_configs[1].layer_idx` must be above the one before it (3), got 3"
    );
    let zero = LayerConfig { initial_threshold: 0.0, ..layer };
    assert_eq!(
        refused(vec![zero]),
        "`layer_configs[0].initial_threshold` must be finite and at least 1e-6, got 0"
    );
    let nan = LayerConfig { target_exit_rate: f32::NAN, ..layer };
    assert_eq!(refused(vec![nan]), "`layer_configs[0].target_exit_rate` must be finite, got NaN");

    let config = CascadeConfig::new(vec![layer]).unwrap();
    assert!(matches!(config.clone().with_alpha(1.5), Err(Error::OutOfRange { got: 1.5, .. })));
    assert!(matches!(config.clone().with_n_levels(1), Err(Error::OutOfRange { .. })));
    let (controller, other) = (CascadeController::new(config.clone()), CascadeController::new(config));
    let mut pass = controller.begin(2).unwrap();
    let step = |pass: &mut _, i, risk: &[f32]| controller.step(pass, i, risk).unwrap_err();
    assert_eq!(step(&mut pass, 0, &[0.0]), Error::Length { name: "risk", expected: 2, got: 1 });
    assert_eq!(
        step(&mut pass, 1, &[0.0; 2]),
        Error::CheckpointOrder { expected: 0, n_checkpoints: 1, got: 1 }
    );
    assert_eq!(other.step(&mut pass, 0, &[0.0; 2]).unwrap_err(), Error::ForeignPass);
    assert_eq!(controller.step(&mut pass, 0, &[0.0; 2]).unwrap(), [6, 6]); // the refusals left the pass as it was
    assert_eq!(
        step(&mut pass, 1, &[0.0; 2]),
        Error::CheckpointOrder { expected: 1, n_checkpoints: 1, got: 1 }
    );
    assert_eq!(controller.begin(usize::MAX).unwrap_err(), Error::TooManyTokens { n_tokens: usize::MAX });
    assert_eq!(controller.plan(&[9, 3]).unwrap_err(), Error::Level { n_levels: 8, got: 9 });
}

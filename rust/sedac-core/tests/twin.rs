//! The law in whole numbers: its distance from the float law, its oracle, and what a replay finds.

use proptest::prelude::*;
use sedac_core::{
    CascadeConfig, CascadeController, Error, LayerConfig, ParameterBlock, RISK_BEYOND, RISK_UNUSABLE,
    STATE_FAILED, STATE_LATCHED, STATE_SUNK,
};

/// Ordinary risks, and every kind of f32 that a broken probe could give.
fn risk() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => 0.0_f32..3.0,
        1 => 0.0_f32..100.0,
        1 => any::<f32>(),
        1 => any::<u32>().prop_map(f32::from_bits),
    ]
}

/// Thresholds from the floor to where no risk counts, as calibration gives them.
fn threshold() -> impl Strategy<Value = f32> {
    prop_oneof![4 => 0.05_f32..4.0, 1 => (-19.0_f32..21.0).prop_map(f32::exp2)]
}

fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![4 => 0.0_f32..2.0, 1 => Just(0.0), 1 => (-30.0_f32..4.0).prop_map(f32::exp2)]
}

fn target() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -2.0_f32..1.5, 1 => Just(-1e9_f32), 1 => -1e3_f32..1e3]
}

fn config() -> impl Strategy<Value = CascadeConfig> {
    let layers = prop::collection::vec((target(), threshold(), weight()), 1..5);
    let decay = prop_oneof![3 => 0.0_f32..=1.0, 1 => Just(0.0), 1 => Just(1.0), 1 => 0.0_f32..1e-3];
    (layers, decay, any::<bool>(), 2_u8..=64).prop_map(|(layers, decay, soft_exit, n_levels)| {
        let layers = (2..).zip(layers).map(|(layer_idx, (target, threshold, weight))| {
            LayerConfig::new(layer_idx * 3, target, threshold, weight)
        });
        let config = CascadeConfig::new(layers.collect()).unwrap().with_soft_exit(soft_exit);
        config.with_confidence_decay(decay).unwrap().with_n_levels(n_levels).unwrap()
    })
}

/// A cascade, and risks for up to 40 tokens of it, checkpoint after checkpoint.
fn batch() -> impl Strategy<Value = (CascadeConfig, Vec<f32>, usize)> {
    (config(), 1_usize..40).prop_flat_map(|(config, n_tokens)| {
        let risks = prop::collection::vec(risk(), n_tokens * config.n_checkpoints());
        (Just(config), risks, Just(n_tokens))
    })
}

fn design() -> CascadeController {
    let layers = [(3, 0.2, 0.8, 0.3), (6, 0.5, 1.0, 0.4), (9, 0.8, 1.2, 0.3)];
    let layers =
        layers.map(|(layer, target, threshold, weight)| LayerConfig::new(layer, target, threshold, weight));
    CascadeController::new(CascadeConfig::new(layers.to_vec()).unwrap())
}

/// Quantised risks and levels of whole passes.
fn run(block: &ParameterBlock, risk: &[f32], n_tokens: usize) -> (Vec<i16>, Vec<u8>) {
    let mut states = vec![0; n_tokens];
    let (mut log_q, mut log_levels) = (vec![], vec![]);
    for (i, risk) in risk.chunks(n_tokens).enumerate() {
        let risk_q = block.quantise(i, risk).unwrap();
        log_levels.extend(block.step(i, &mut states, &risk_q).unwrap());
        log_q.extend(risk_q);
    }
    (log_q, log_levels)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn levels_are_the_float_laws_but_near_a_cut_point((config, risk, n_tokens) in batch()) {
        let controller = CascadeController::new(config.clone());
        let block = controller.parameter_block();
        let mut pass = controller.begin(n_tokens).unwrap();
        let mut states = vec![0; n_tokens];
        let mut near_before = vec![false; n_tokens];
        let mut beyond = vec![false; n_tokens]; // a risk that lowers the twin's C further than the law's, or sinks it
        for (i, risk) in risk.chunks(n_tokens).enumerate() {
            let levels = controller.step(&mut pass, i, risk).unwrap();
            let twins = block.step(i, &mut states, &block.quantise(i, risk).unwrap()).unwrap();
            let far = block.distance()[i];
            for t in 0..n_tokens {
                let c = f64::from(pass.confidence()[t]);
                let is_near = |cut: f32| (c - f64::from(cut)).abs() <= far;
                let near = is_near(config.layers()[i].target_exit_rate)
                    || config.keep_levels().cut_points().iter().copied().any(is_near);
                near_before[t] |= near;
                let state = states[t];
                beyond[t] |= state == STATE_SUNK || risk[t] > 0.99e6 * config.layers()[i].initial_threshold;
                if state != STATE_FAILED && !beyond[t] && state != STATE_LATCHED {
                    let twin_c = f64::from(state) * block.unit();
                    prop_assert!((twin_c - c).abs() <= far, "C {} but {}, distance {}", c, twin_c, far);
                }
                prop_assert_eq!(state == STATE_FAILED, pass.failed()[t]);
                let excused = if config.soft_exit() { near } else { near_before[t] };
                if beyond[t] {
                    prop_assert!(excused || twins[t] >= levels[t], "a token keeps less than the law asks");
                } else {
                    prop_assert!(excused || twins[t] == levels[t], "level {} but {}", levels[t], twins[t]);
                }
            }
        }
    }

    #[test]
    fn less_risk_never_keeps_more((config, low, high) in (config(), 0.0_f32..40.0, 0.0_f32..40.0)) {
        let (low, high) = (low.min(high), low.max(high));
        let risk = [low, high].repeat(config.n_checkpoints());
        let (_, levels) = run(&CascadeController::new(config).parameter_block(), &risk, 2);
        prop_assert!(levels.chunks(2).all(|levels| levels[0] <= levels[1]));
    }

    #[test]
    fn quantising_what_was_dequantised_gives_it_back((config, q) in (config(), RISK_UNUSABLE..=RISK_BEYOND)) {
        let block = CascadeController::new(config).parameter_block();
        for i in 0..block.checkpoints().len() {
            let risk = block.dequantise(i, &[q]).unwrap();
            let expected = if risk[0].is_finite() { q } else { RISK_UNUSABLE }; // beyond what f32 holds
            prop_assert_eq!(block.quantise(i, &risk).unwrap(), [expected]);
        }
    }

    #[test]
    fn a_replay_finds_nothing_but_what_was_altered((config, risk, n_tokens) in batch(), place in any::<prop::sample::Index>()) {
        let controller = CascadeController::new(config);
        let block = controller.parameter_block();
        let (risk_q, mut levels) = run(&block, &risk, n_tokens);
        let replay = block.replay(&risk_q, &levels, n_tokens).unwrap();
        prop_assert_eq!(replay.mismatches, 0);
        for ((&level, &exited), &ratio) in levels.iter().zip(&replay.exited).zip(&replay.ratios) {
            let skipped = 1.0 - f32::from(level) / f32::from(block.n_levels());
            prop_assert!(skipped <= ratio + 1e-6 && (exited || (skipped, ratio) == (0.0, 0.0)));
        }
        let place = place.index(levels.len());
        levels[place] ^= 1;
        prop_assert_eq!(block.replay(&risk_q, &levels, n_tokens).unwrap().mismatches, 1);
    }
}

#[test]
fn a_risk_beyond_the_designs_range_settles_the_pass_as_the_float_law_does() {
    let (controller, n_tokens) = (design(), 50_000);
    let random = |i: u32| (f64::from(i) * 0.618_033_988_75).fract() as f32;
    // One risk beyond the range, at each place in turn, among the best that could come before and after.
    let risk: Vec<f32> = (0..3 * n_tokens)
        .map(|i| match (i / n_tokens == i % 3, random(i)) {
            (true, x) => 5.0 + x * x * 1e6,
            (false, x) if i % 2 == 0 => x * 0.01,
            _ => 0.0,
        })
        .collect();
    let decisions = controller.evaluate_batch(&risk, n_tokens as usize).unwrap();
    let block = controller.parameter_block();
    let (risk_q, levels) = run(&block, &risk, n_tokens as usize);
    assert!(risk_q.iter().filter(|&&q| q == RISK_BEYOND).count() > 40_000);
    let differing = levels.iter().zip(&decisions.levels).filter(|(twin, float)| twin != float).count();
    assert!(differing <= levels.len() / 1000, "{differing} of {} levels differ", levels.len());
}

#[test]
fn the_designs_numbers() {
    let block = design().parameter_block();
    let decay = f64::from(0.9_f32) * f64::from(1 << 30);
    assert_eq!((block.decay() as f64, block.n_levels(), block.soft_exit()), (decay, 8, true));
    // Thresholds are whole to 2^-16 of a step: nothing of an f32 near 1 is lost.
    let exact = |i: usize| {
        let parameters = block.checkpoints()[i];
        (parameters.threshold as f64 / f64::from(1 << 16) / f64::from(parameters.step_exponent).exp2())
            .to_bits()
    };
    assert_eq!(
        [exact(0), exact(1), exact(2)],
        [0.8_f32, 1.0, 1.2].map(|threshold| f64::from(threshold).to_bits())
    );
    assert!(block.distance().iter().all(|&far| far < 5e-4), "{:?}", block.distance());
    // A cut point of an exit at the very confidence: ties exit.
    let single =
        CascadeConfig::new(vec![LayerConfig::new(0, 0.5, 1.0, 1.0)]).unwrap().with_n_levels(2).unwrap();
    let block = CascadeController::new(single).parameter_block();
    let (_, levels) = run(&block, &[0.5, 0.500_2, f32::NAN, f32::INFINITY, -3.0, 1e30], 6);
    assert_eq!(levels, [1, 2, 2, 2, 1, 2]);
}

#[test]
fn a_block_keeps_the_thresholds_it_was_made_with() {
    let controller = design();
    let before = controller.parameter_block();
    controller.set_thresholds(&[0.4, 1.0, 1.2]).unwrap();
    let after = controller.parameter_block();
    assert_ne!(before.checkpoints()[0], after.checkpoints()[0]);
    assert_eq!(before.checkpoints()[1].threshold, after.checkpoints()[1].threshold);
    assert_eq!(run(&before, &[0.5], 1).1, [8]);
    assert_eq!(
        controller.evaluate_batch(&[0.2, 0.0, 0.0], 1).unwrap().levels[0],
        run(&after, &[0.2], 1).1[0]
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let block = design().parameter_block();
    let wrong_checkpoint = Error::CheckpointIndex { n_checkpoints: 3, got: 3 };
    assert_eq!(block.quantise(3, &[0.0]).unwrap_err(), wrong_checkpoint);
    assert_eq!(block.dequantise(3, &[0]).unwrap_err(), wrong_checkpoint);
    assert_eq!(block.step(3, &mut [0], &[0]).unwrap_err(), wrong_checkpoint);
    let length = |name, expected, got| Error::Length { name, expected, got };
    assert_eq!(block.step(0, &mut [0; 2], &[0]).unwrap_err(), length("risk_q", 2, 1));
    assert_eq!(block.replay(&[0; 5], &[8; 6], 2).unwrap_err(), length("risk_q", 6, 5));
    assert_eq!(block.replay(&[0; 6], &[8; 5], 2).unwrap_err(), length("levels", 6, 5));
    assert_eq!(block.replay(&[], &[], 0).unwrap().mismatches, 0);
}

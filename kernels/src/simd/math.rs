//! Elementary functions in f32 without branches or calls, so that loops over them vectorise; the same bits on every
//! instruction set (no contraction to FMA).

/// e^x within 2 ulp; 0 and infinity beyond the range of f32, NaN stays NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor series to r^7 (remainder 5e-9), 2^n in two factors.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4; // 355 / 512, exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -110.0 { -110.0 } else { x };
    let x = if x > 100.0 { 100.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let tail = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)));
    let p = 1.0 + (r + r * r * (0.5 + r * (1.0 / 6.0 + r * tail)));
    let n = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Coefficients of u^0, u^1, ... at u.
#[inline(always)]
fn polynomial<const N: usize>(u: f32, coefficients: [f32; N]) -> f32 {
    coefficients.into_iter().rev().fold(0.0, |sum, c| sum * u + c)
}

/// The error function within 3e-7.
///
/// Fitted at Chebyshev nodes for this file: x P(x^2) up to |x| = 1, 1 - e^(-x^2) Q(1 / (1 + |x| / 2)) beyond.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let near = [
        std::f32::consts::FRAC_2_SQRT_PI,
        -0.376_126_26,
        0.112_835_97,
        -0.026_854_329,
        0.005_189_312_6,
        -0.000_801_885_9,
        0.000_078_825,
    ];
    let far = [
        -0.000_128_657_09,
        0.284_471_63,
        0.262_990_9,
        0.333_787_6,
        -0.066_789_284,
        0.501_938_76,
        -0.407_970_5,
        0.082_458_14,
        0.009_326_088,
    ];
    let size = x.abs();
    let inner = x * polynomial(x * x, near);
    let outer = (1.0 - exp(-size * size) * polynomial(1.0 / (1.0 + 0.5 * size), far)).copysign(x);
    if size <= 1.0 { inner } else { outer }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_agrees_with_the_library() {
        for i in -80_000..=80_000 {
            let x = i as f32 * 1e-4;
            let exact = candle_core::cpu::erf::erf_f64(f64::from(x));
            assert!((f64::from(erf(x)) - exact).abs() < 3e-7, "erf({x}) = {} not {exact}", erf(x));
        }
        assert_eq!((erf(f32::INFINITY), erf(f32::NEG_INFINITY), erf(0.0)), (1.0, -1.0, 0.0));
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.log2().floor() as i32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        assert!(worst < 2.0, "worst error {worst} ulp");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(-110.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-100.0) > 0.0 && exp(-100.0) < 1e-43);
    }

    #[test]
    fn sigmoid_saturates() {
        assert_eq!(sigmoid(200.0), 1.0);
        assert_eq!(sigmoid(-200.0), 0.0);
        assert_eq!(sigmoid(0.0), 0.5);
    }
}

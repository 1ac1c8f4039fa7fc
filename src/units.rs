//! Numbers as people read them, and sizes as they write them.

use std::time::Duration;

use tender_kvstore::Size;

/// Reads `1GiB`, `512MiB`, `64KiB`, `10GB` or plain bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    text.parse::<Size>().map(|Size(bytes)| bytes).map_err(|error| error.to_string())
}

/// `1.5 GiB`.
pub fn bytes(bytes: u64) -> String {
    Size(bytes).to_string()
}

/// `1,234,567`.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Gigabytes (10^9 bytes) per second.
pub fn gb_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64().max(1e-9)
}

/// `1.24 ms`.
pub fn micros(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..1_000_000 => format!("{:.2} ms", micros as f64 / 1e3),
        _ => format!("{:.2} s", micros as f64 / 1e6),
    }
}

/// `1 h 2 min`, `2 min 3 s`, `3.4 s`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([count(7), count(1234), count(123_456), count(1_234_567)], ["7", "1,234", "123,456", "1,234,567"]);
        assert_eq!([micros(999), micros(1_240), micros(2_500_000)], ["999 µs", "1.24 ms", "2.50 s"]);
        assert_eq!(duration(Duration::from_millis(3_400)), "3.4 s");
        assert_eq!(duration(Duration::from_secs(3_720)), "1 h 2 min");
    }
}

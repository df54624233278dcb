//! Bytes as pairs of hexadecimal digits. Serial numbers are written in upper case, as `openssl x509 -serial` does it, fingerprints and hashes
//! in lower case.

pub fn upper(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

pub fn lower(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Of either case, and of nothing but digits.
pub fn parse(text: &str) -> Option<Vec<u8>> {
    let digits = text.bytes().map(|digit| char::from(digit).to_digit(16)).collect::<Option<Vec<_>>>()?;
    let (pairs, []) = digits.as_chunks() else { return None };
    pairs.iter().map(|[high, low]| u8::try_from(high << 4 | low).ok()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_again_in_either_case(bytes: Vec<u8>) {
            prop_assert_eq!(parse(&lower(&bytes)), Some(bytes.clone()));
            prop_assert_eq!(parse(&upper(&bytes)), Some(bytes));
        }
    }

    #[test]
    fn bytes_have_two_digits_each_and_nothing_else_is_one() {
        assert_eq!((upper(&[0x0a, 0xff]), lower(&[0x0a, 0xff])), ("0AFF".to_owned(), "0aff".to_owned()));
        for none in ["a", "0x", "+5", "-5", " 5", "5 ", "äb", "abg0"] {
            assert_eq!(parse(none), None, "{none:?}");
        }
    }
}

//! Names: RFC 1123 labels, because they become host names.

/// Longest name (RFC 1123: one DNS label).
pub const MAX_LEN: usize = 63;

/// Why `name` is not a valid name, in words that say what would be valid; `None` when it is.
#[must_use]
pub fn problem(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("must not be empty; use lower-case letters, digits and '-'".into());
    }
    if name.len() > MAX_LEN {
        return Some(format!("has {} characters; at most {MAX_LEN} are allowed", name.len()));
    }
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if let Some(bad) = name.chars().find(|c| !inner(*c)) {
        return Some(format!("contains {bad:?}; use lower-case letters, digits and '-'"));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Some("must start and end with a letter or digit".into());
    }
    if name.parse::<uuid::Uuid>().is_ok() {
        return Some("looks like an id; choose a name that is not a UUID".into());
    }
    None
}

/// As [`problem`], but dots are allowed between labels: image and flavor names such as `debian-12.5`.
#[must_use]
pub fn dotted_problem(name: &str) -> Option<String> {
    if name.len() > MAX_LEN {
        return Some(format!("has {} characters; at most {MAX_LEN} are allowed", name.len()));
    }
    name.split('.').find_map(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "web", "web-1", "1a", &"x".repeat(63)] {
            assert_eq!(problem(good), None, "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"x".repeat(64), "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"] {
            assert!(problem(bad).is_some(), "{bad}");
        }
        assert_eq!(dotted_problem("debian-12.5"), None);
        assert!(dotted_problem("a..b").is_some());
    }
}

//! Suggestions for mistyped names.

/// The candidates that are close to `word`, nearest first, at most three.
pub fn near<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let limit = match word.chars().count() {
        0..4 => 1,
        4..8 => 2,
        _ => 3,
    };
    let mut found: Vec<(usize, &str)> = candidates
        .into_iter()
        .filter_map(|candidate| {
            let d = distance(word, candidate);
            let begins = word.len() >= 2 && candidate.starts_with(word);
            (d <= limit || begins).then_some((if begins { d.min(limit) } else { d }, candidate))
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found.into_iter().take(3).map(|(_, c)| c).collect()
}

/// `did you mean a or b?`; empty when nothing is near.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    let found = near(word, candidates);
    if found.is_empty() { String::new() } else { format!("did you mean {}?", found.join(" or ")) }
}

/// Edits (insert, delete, change, swap neighbours) between two words: the optimal string alignment distance.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        assert_eq!(near("wbe", ["web", "job", "database"]), ["web"]);
        assert_eq!(near("instnace", ["instance", "image"]), ["instance"]);
        assert_eq!(near("debian", ["debian-12", "tiny"]), ["debian-12"]);
        assert!(near("x", ["web"]).is_empty() && near("job", ["web"]).is_empty());
        assert_eq!(did_you_mean("tyni", ["tiny", "busybox"]), "did you mean tiny?");
        assert_eq!(did_you_mean("zzz", ["tiny"]), "");
    }
}

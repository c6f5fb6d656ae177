//! What a person reads when the cloud is up.

use std::path::{Path, PathBuf};

/// Facts for the banner.
pub struct Banner<'a> {
    /// URL of API and console.
    pub url: &'a str,
    /// Password of the first administrator, when it was made just now.
    pub password: Option<&'a str>,
    /// Context file that was written.
    pub context: Option<PathBuf>,
    /// The data directory.
    pub data: &'a Path,
    /// Things worth knowing, such as slow guests.
    pub notices: &'a [String],
}

impl Banner<'_> {
    /// The text.
    pub fn text(&self) -> String {
        let mut out = format!(
            "\nOblak is up.\n\n  API and console  {}\n  API reference    {}/docs\n  data             {}\n",
            self.url,
            self.url,
            self.data.display()
        );
        match self.password {
            Some(password) => out.push_str(&format!(
                "  login            admin / {password}   (shown once; also in {}/admin-password)\n",
                self.data.display()
            )),
            None => out.push_str("  login            admin   (the password you were shown the first time)\n"),
        }
        if let Some(context) = &self.context {
            out.push_str(&format!("  command line     ready to use: {}\n", context.display()));
        }
        for notice in self.notices {
            out.push_str(&format!("\n  note: {notice}\n"));
        }
        out.push_str(
            "\nNext steps:\n  oblak image list\n  oblak launch tiny    --name web --isolation vm --key ~/.ssh/id_ed25519.pub --wait\n  oblak launch busybox --name job --isolation container --wait -- httpd -f -p 80 -h /\n  oblak exec job -- ping -c1 web\n",
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_password_only_when_it_is_new() {
        let mut banner = Banner {
            url: "https://127.0.0.1:7443",
            password: Some("s3cret-pass"),
            context: None,
            data: Path::new("/var/lib/oblak"),
            notices: &[],
        };
        assert!(banner.text().contains("admin / s3cret-pass"));
        banner.password = None;
        assert!(!banner.text().contains("s3cret"));
    }
}

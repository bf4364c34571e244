//! Logins as the vendors' tools write them, with tokens that no other test has.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Clone, Debug)]
pub struct Login {
    pub access: String,
    pub refresh: String,
    pub id_token: String,
    pub account: String,
    /// Unix seconds.
    pub expires: u64,
}

pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_secs()
}

/// 32 letters, never the same twice in a run and unlike anything that a log says.
pub fn noise() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let seed = NEXT.fetch_add(1, Ordering::Relaxed) ^ (u64::from(std::process::id()) << 32);
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let first = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bytes = [first.to_be_bytes(), mix(!first).to_be_bytes()].concat();
    let letters = |byte: u8| [b'A' + byte / 16, b'g' + byte % 16];
    bytes
        .into_iter()
        .flat_map(letters)
        .map(char::from)
        .collect()
}

/// A JSON Web Token with these claims and a signature that nobody checks.
fn jwt(claims: &Value) -> String {
    let part = |text: String| BASE64_URL_SAFE_NO_PAD.encode(text);
    let head = part(json!({"alg": "none"}).to_string());
    format!("{head}.{}.{}", part(claims.to_string()), noise())
}

/// A token as ChatGPT issues it: the expiry and the account are claims of it.
pub fn chatgpt_token(expires: u64, account: &str) -> String {
    let claim = json!({"chatgpt_account_id": account});
    jwt(&json!({"exp": expires, "https://api.openai.com/auth": claim}))
}

impl Login {
    /// `ttl` in seconds from now; negative for one that has expired.
    pub fn new(provider: &str, ttl: i64) -> Login {
        let expires = now().saturating_add_signed(ttl);
        let account = format!("acct{}", noise());
        let token = || chatgpt_token(expires, &account);
        Login {
            access: if provider == "claude" {
                noise()
            } else {
                token()
            },
            refresh: noise(),
            id_token: token(),
            account,
            expires,
        }
    }

    /// Claude Code's own file.
    pub fn claude(&self) -> Value {
        json!({"claudeAiOauth": {
            "accessToken": self.access, "refreshToken": self.refresh, "expiresAt": self.expires * 1000,
            "scopes": ["user:inference", "user:profile"], "subscriptionType": "max",
        }})
    }

    /// The flat form of auth.json.
    pub fn flat(&self) -> Value {
        json!({"access_token": self.access, "refresh_token": self.refresh,
            "expires_at": self.expires, "account_id": self.account})
    }

    /// Codex's own form of auth.json.
    pub fn codex(&self) -> Value {
        json!({"OPENAI_API_KEY": null, "tokens": {
            "id_token": self.id_token, "access_token": self.access,
            "refresh_token": self.refresh, "account_id": self.account,
        }, "last_refresh": "2026-01-01T00:00:00Z"})
    }

    /// The provider's own file for this login.
    pub fn file(&self, provider: &str) -> Value {
        if provider == "claude" {
            self.claude()
        } else {
            self.codex()
        }
    }
}

pub fn path(state: &Path, provider: &str) -> PathBuf {
    match provider {
        "claude" => state.join("claude/.credentials.json"),
        _ => state.join("chatgpt/auth.json"),
    }
}

/// Writes a credential file whole, as a careful tool would.
pub fn save(state: &Path, provider: &str, file: &Value) {
    let path = path(state, provider);
    fs::create_dir_all(path.parent().expect("a folder")).expect("make a folder");
    let new = path.with_extension("new");
    fs::write(&new, file.to_string()).expect("write a credential");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("chmod");
    fs::rename(new, path).expect("put a credential in place");
}

pub fn read(state: &Path, provider: &str) -> Value {
    let text = fs::read(path(state, provider)).expect("read a credential");
    serde_json::from_slice(&text).expect("a whole credential")
}

/// The command that logs in, as the messages tell it.
pub fn remedy(state: &Path, provider: &str) -> String {
    let folder = state.join(provider);
    let folder = folder.display();
    match provider {
        "claude" => format!("CLAUDE_CONFIG_DIR='{folder}' claude auth login"),
        _ => format!("CODEX_HOME='{folder}' codex login"),
    }
}

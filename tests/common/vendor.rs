//! The other half of the stand-in: the logins it knows, and the token endpoints of both vendors.

use super::lock;
use super::login::{Login, chatgpt_token, noise, now};
use super::upstream::{Conn, Request, Steps, Upstream};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex};

/// Looks at a refresh first; true if it has answered it.
pub type RefreshScript = dyn Fn(&Request, &mut Conn) -> io::Result<bool> + Send + Sync;

/// What the vendors know, and what no log may hold.
#[derive(Default)]
pub struct Vendors {
    tokens: Mutex<Tokens>,
    script: Mutex<Option<Arc<RefreshScript>>>,
    /// Each secret, and how much of its beginning may be shown.
    secrets: Mutex<HashMap<String, usize>>,
}

#[derive(Default)]
struct Tokens {
    good: HashSet<String>,
    /// Refresh tokens that can still be spent, and the account of each.
    unspent: HashMap<String, String>,
    reused: usize,
}

impl Upstream {
    /// A login that expires in `ttl` seconds, which this upstream accepts and can refresh.
    pub fn login(&self, provider: &str, ttl: i64) -> Login {
        let login = Login::new(provider, ttl);
        self.accept(&login);
        login
    }

    pub fn accept(&self, login: &Login) {
        self.secret(&login.account);
        let vendors = &self.shared.vendors;
        for token in [&login.access, &login.refresh, &login.id_token] {
            vendors.oauth_secret(token);
        }
        let mut tokens = lock(&vendors.tokens);
        tokens.good.insert(login.access.clone());
        let account = login.account.clone();
        tokens.unspent.insert(login.refresh.clone(), account);
    }

    /// From now on this access token is answered 401.
    pub fn revoke(&self, access: &str) {
        lock(&self.shared.vendors.tokens).good.remove(access);
    }

    /// From now on this refresh token is answered like a spent one.
    pub fn end_login(&self, refresh: &str) {
        lock(&self.shared.vendors.tokens).unspent.remove(refresh);
    }

    /// Whether this refresh token could still be spent.
    pub fn honours(&self, refresh: &str) -> bool {
        lock(&self.shared.vendors.tokens)
            .unspent
            .contains_key(refresh)
    }

    /// No log may hold anything of this.
    pub fn secret(&self, text: &str) {
        lock(&self.shared.vendors.secrets).insert(text.to_owned(), 0);
    }

    pub fn on_refresh(
        &self,
        script: impl Fn(&Request, &mut Conn) -> io::Result<bool> + Send + Sync + 'static,
    ) {
        *lock(&self.shared.vendors.script) = Some(Arc::new(script));
    }

    /// Refreshes wait for the step.
    pub fn hold_refreshes(&self) -> Steps {
        let go = Steps::default();
        let held = go.clone();
        self.on_refresh(move |_, _| {
            held.wait(1);
            Ok(false)
        });
        go
    }

    /// Refreshes go well again.
    pub fn refresh_again(&self) {
        *lock(&self.shared.vendors.script) = None;
    }

    /// How often a refresh token was sent that had been spent or never issued.
    pub fn reused(&self) -> usize {
        lock(&self.shared.vendors.tokens).reused
    }
}

impl Vendors {
    pub fn knows(&self, access: &str) -> bool {
        lock(&self.tokens).good.contains(access)
    }

    fn oauth_secret(&self, token: &str) {
        lock(&self.secrets).insert(token.to_owned(), 8);
    }

    /// The first secret that a log shows too much of, if any: 6 characters in a row, not all of them of the
    /// beginning that may be shown.
    pub fn shown(&self, log: &str) -> Option<String> {
        let shows = |secret: &str, most: usize| {
            let mut pieces = (most.saturating_sub(5)..).map_while(|at| secret.get(at..at + 6));
            pieces.any(|piece| log.contains(piece))
        };
        let secrets = lock(&self.secrets);
        let found = secrets.iter().find(|(secret, most)| shows(secret, **most));
        found.map(|(secret, _)| secret.clone())
    }

    pub fn refresh(&self, request: &Request, conn: &mut Conn) -> io::Result<()> {
        let script = lock(&self.script).clone();
        if let Some(script) = script
            && script(request, conn)?
        {
            return Ok(());
        }
        match self.renew(request, 8 * 3600) {
            Some(answer) => conn.json(200, &answer),
            None if request.provider() == "claude" => {
                conn.json(400, &json!({"error": "invalid_grant"}))
            }
            None => conn.json(401, &json!({"error": {"code": "refresh_token_reused"}})),
        }
    }

    /// Spends the refresh token of a request: the vendor's answer with new tokens, or None.
    pub fn renew(&self, request: &Request, ttl: u64) -> Option<Value> {
        let body: Value = serde_json::from_slice(&request.body).ok()?;
        let mut tokens = lock(&self.tokens);
        let Some(account) = tokens.unspent.remove(body["refresh_token"].as_str()?) else {
            tokens.reused += 1;
            return None;
        };
        let mut answer = json!({"refresh_token": noise()});
        if request.provider() == "claude" {
            answer["access_token"] = json!(noise());
            answer["expires_in"] = json!(ttl);
        } else {
            answer["access_token"] = json!(chatgpt_token(now() + ttl, &account));
            answer["id_token"] = json!(chatgpt_token(now() + ttl, &account));
        }
        let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
        tokens.good.insert(text("access_token"));
        tokens.unspent.insert(text("refresh_token"), account);
        for key in ["access_token", "refresh_token", "id_token"] {
            if answer[key].is_string() {
                self.oauth_secret(&text(key));
            }
        }
        Some(answer)
    }
}

BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
INSERT INTO "_sqlite_migrations" VALUES(1,'mcp-flow','m001_journal','2026-11-21 07:26:48.711749+00:00');
CREATE TABLE beats (worker TEXT PRIMARY KEY, pid INTEGER NOT NULL, beat INTEGER NOT NULL) WITHOUT ROWID
;
INSERT INTO "beats" VALUES('w-1',10036,1);
CREATE TABLE checkpoints (run INTEGER PRIMARY KEY REFERENCES journals(no), at TEXT NOT NULL, data TEXT NOT NULL);
INSERT INTO "checkpoints" VALUES(1,'2026-05-01T12:00:09.000000Z','{"storage": {"cookies": [{"name": "session", "value": "1"}], "origins": []}, "urls": {"main": "http://shop/cart", "mail": "http://mail/"}, "titles": {"main": ["http://shop/cart", "Cart"]}}');
INSERT INTO "checkpoints" VALUES(2,'2026-05-01T12:00:14.000000Z','{"storage": {"cookies": [], "origins": []}, "titles": {}}');
CREATE TABLE events (
  run INTEGER NOT NULL REFERENCES journals(no), seq INTEGER NOT NULL, at TEXT NOT NULL, epoch INTEGER,
  type TEXT NOT NULL, data TEXT NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (run, seq)
) WITHOUT ROWID;
INSERT INTO "events" VALUES(1,1,'2026-05-01T12:00:01.000000Z',NULL,'run.created','{"workflow":"buy","function":"buy","root":"/w","entry":"buy.py","revision":"abc","input":{"item":"tea"}}',X'6C0FD142F465BDD5F6655C084CF7B8496D45DC85F63405DAB8CF0D93790A4C85');
INSERT INTO "events" VALUES(1,2,'2026-05-01T12:00:02.000000Z',1,'run.claimed','{"worker":"w-1"}',X'A1C821212401DE7C1B2A5394BB676B6E037A729CAE0CE4B1635032AA26117F5C');
INSERT INTO "events" VALUES(1,3,'2026-05-01T12:00:03.000000Z',1,'attempt.started','{"attempt":1,"revision":"abc"}',X'758405F7A05150FE653B3BDE1BC2C47310F368D01D2FA5A222992ADADF7C1B7D');
INSERT INTO "events" VALUES(1,4,'2026-05-01T12:00:03.000000Z',1,'page.opened','{"name":"main","target_id":"T1"}',X'D63B7B5727CE70C63B693B84F6C5CD6C88410D9A7FE5DCF6299BE618C6CEA6FF');
INSERT INTO "events" VALUES(1,5,'2026-05-01T12:00:04.000000Z',1,'step.started','{"key":"open shop#1","fingerprint":"f1"}',X'53691895718F09CD2DEB5E3DC9CF71153741A26B499AE514B77AEFFD79BAFD0B');
INSERT INTO "events" VALUES(1,6,'2026-05-01T12:00:04.000000Z',1,'step.finished','{"key":"open shop#1","value":"ünï","ms":1.5}',X'94D537909E47F090B602B9AEA866A01660050AAB08040E7116280BE042251AC9');
INSERT INTO "events" VALUES(1,7,'2026-05-01T12:00:05.000000Z',1,'value.recorded','{"key":"now#1","value":"2026-05-01"}',X'495E7FA1D8B2405593DDE6A903E91E15603C13839009025241FA538EDA741A7C');
INSERT INTO "events" VALUES(1,8,'2026-05-01T12:00:06.000000Z',1,'request.opened','{"request_id":"q-1","key":"ask#1","kind":"input","prompt":"How many?","fingerprint":"t1","answer_schema":{"type":"integer"}}',X'45C59C36F869AAE426BF4FC229AE192DD637A6536F9FB48D7E7AFFCAC9EDC291');
INSERT INTO "events" VALUES(1,9,'2026-05-01T12:00:07.000000Z',NULL,'request.answered','{"request_id":"q-1","value":3,"by":"agent"}',X'1E2108032FB22894311C285B1173DD67F39C0D567B1613BFDE43A37B3B861177');
INSERT INTO "events" VALUES(1,10,'2026-05-01T12:00:08.000000Z',1,'request.opened','{"request_id":"q-2","key":"Pay?#1","kind":"approval","prompt":"Pay?","fingerprint":"t2","data":{"total":5},"expires":"2026-05-02T00:00:00Z"}',X'B25D871664F8D3E23C777EE8620D0413CD522DC2C6FFB4931F803C967AD7DD6B');
INSERT INTO "events" VALUES(1,11,'2026-05-01T12:00:08.000000Z',1,'attempt.idled','{}',X'2095012CD84BF4B5C93A7FE8AF61A91A55EC953F82F6671334F5640C8139AA2C');
INSERT INTO "events" VALUES(2,1,'2026-05-01T12:00:10.000000Z',NULL,'run.created','{"workflow":"buy","function":"buy","root":"/w","entry":"buy.py","revision":"abc","input":{"item":"tea"}}',X'A2CA75D55489E4239A3D01A61814D034CD9F6C0D0F3AD684195C38C0AEB6068A');
INSERT INTO "events" VALUES(2,2,'2026-05-01T12:00:11.000000Z',1,'run.claimed','{"worker":"w-2"}',X'ED4CB01BDEBB8A0A76D01DB78781EF014B7E81B9B2926680F8BF32D04C9A36B1');
INSERT INTO "events" VALUES(2,3,'2026-05-01T12:00:12.000000Z',1,'attempt.started','{"attempt":1,"revision":"abc"}',X'567A02B83D916C9C35D30B6EF91E3E09DD066C1310FFDC573DE0E3BE9644E1FE');
INSERT INTO "events" VALUES(2,4,'2026-05-01T12:00:12.000000Z',1,'step.started','{"key":"pay#1","fingerprint":"f2","once":true}',X'E25A1B83F82BEC2F8720463E92AA7F364C45953F23434DE7493E5143E48810C3');
INSERT INTO "events" VALUES(2,5,'2026-05-01T12:00:13.000000Z',1,'run.failed','{"error":{"type":"ValueError","message":"no such button"}}',X'9D6DE0FCD719EB3948D6CFD7A578EE6EE6BAE2CB2563EDFDC11591B7433A0993');
INSERT INTO "events" VALUES(3,1,'2026-05-01T12:00:15.000000Z',NULL,'run.created','{"workflow":"sell","function":"sell","root":"/w","entry":"sell.py","revision":"abc","input":{"item":"tea"}}',X'446E2AEE9358510CFCE7B7B42FDBB8B31B15BF27C95CB201ACEA5D49C0CDE6AF');
INSERT INTO "events" VALUES(3,2,'2026-05-01T12:00:16.000000Z',NULL,'run.cancelled','{"reason":"enough"}',X'A7C90529A5FF71CC19DCDBBB7A235FECD7BC4886D8F3FE7DE8B62BE77E82E829');
INSERT INTO "events" VALUES(4,1,'2026-05-01T12:00:17.000000Z',NULL,'run.created','{"workflow":"sell","function":"sell","root":"/w","entry":"sell.py","revision":"abc","input":{"item":"tea"}}',X'7A2EB312BD69DDF8AA4D20F87FFC335CA316E50BB7262485B7E31391274B4A11');
CREATE TABLE journals (no INTEGER PRIMARY KEY, run_id TEXT NOT NULL UNIQUE);
INSERT INTO "journals" VALUES(1,'asking');
INSERT INTO "journals" VALUES(2,'failed');
INSERT INTO "journals" VALUES(3,'cancelled');
INSERT INTO "journals" VALUES(4,'queued');
CREATE TABLE request_rows (
  request_id TEXT PRIMARY KEY, run INTEGER NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, status TEXT NOT NULL,
  opened_at TEXT NOT NULL, expires TEXT
) WITHOUT ROWID;
INSERT INTO "request_rows" VALUES('q-1',1,8,'input','answered','2026-05-01T12:00:06.000000Z',NULL);
INSERT INTO "request_rows" VALUES('q-2',1,10,'approval','open','2026-05-01T12:00:08.000000Z','2026-05-02T00:00:00.000000Z');
CREATE TABLE revisions (hash TEXT PRIMARY KEY, entry TEXT NOT NULL, files BLOB NOT NULL) WITHOUT ROWID;
INSERT INTO "revisions" VALUES('abc','buy.py',X'789CAB564A2AADD42BA854B252502A28CACC2BD1502F494D54D78CC953AA050085CB0912');
CREATE TABLE run_rows (
  run INTEGER PRIMARY KEY, workflow TEXT NOT NULL, status TEXT NOT NULL, wants_worker INTEGER NOT NULL, owner TEXT,
  epoch INTEGER NOT NULL, attempt INTEGER NOT NULL, created_at TEXT NOT NULL, why TEXT, has_page INTEGER NOT NULL
);
INSERT INTO "run_rows" VALUES(1,'buy','waiting-approval',0,'w-1',1,1,'2026-05-01T12:00:01.000000Z','Pay?',1);
INSERT INTO "run_rows" VALUES(2,'buy','failed',0,NULL,1,1,'2026-05-01T12:00:10.000000Z','no such button',0);
INSERT INTO "run_rows" VALUES(3,'sell','cancelled',0,NULL,0,0,'2026-05-01T12:00:15.000000Z','enough',0);
INSERT INTO "run_rows" VALUES(4,'sell','queued',1,NULL,0,0,'2026-05-01T12:00:17.000000Z',NULL,0);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE UNIQUE INDEX one_result ON events (run, data ->> 'key', ifnull(data ->> 'generation', 0))
  WHERE type = 'step.finished';
CREATE UNIQUE INDEX one_request ON events (run, data ->> 'key', ifnull(data ->> 'generation', 0), data ->> 'request_id')
  WHERE type = 'request.opened';
CREATE INDEX run_rows_wanting ON run_rows (run) WHERE wants_worker;
CREATE INDEX run_rows_status ON run_rows (status, run);
CREATE INDEX request_rows_open ON request_rows (opened_at, request_id) WHERE status = 'open';
CREATE INDEX request_rows_due ON request_rows (expires) WHERE status = 'open' AND expires IS NOT NULL;
CREATE VIEW runs AS
  SELECT j.run_id, r.workflow, r.status, r.attempt, r.epoch, r.owner, r.created_at, e.at AS updated_at, r.why
  FROM run_rows r JOIN journals j ON j.no = r.run
  JOIN events e ON e.run = r.run AND e.seq = (SELECT max(seq) FROM events WHERE run = r.run);
CREATE VIEW steps AS
  SELECT j.run_id, e.data ->> 'key' AS key, ifnull(e.data ->> 'generation', 0) AS generation,
    replace(e.type, 'step.', '') AS status, e.at, e.data ->> 'value' AS value, e.data ->> 'ms' AS ms,
    e.data ->> '$.error.message' AS error
  FROM events e JOIN journals j ON j.no = e.run WHERE e.type IN ('step.started', 'step.finished', 'step.failed')
  AND e.seq = (SELECT max(l.seq) FROM events l WHERE l.run = e.run AND l.type LIKE 'step.%'
    AND l.data ->> 'key' = e.data ->> 'key');
CREATE VIEW requests AS
  SELECT q.request_id, j.run_id, q.kind, q.status, q.opened_at, q.expires, e.data ->> 'prompt' AS prompt,
    e.data ->> 'by' AS "by"
  FROM request_rows q JOIN journals j ON j.no = q.run JOIN events e ON e.run = q.run AND e.seq = q.seq;
COMMIT;
PRAGMA user_version = 1;

/** What the relay answers, as far as the page reads it. Fields that it does not name are let pass. */
import { z } from 'zod';

export const family = z.enum(['llama', 'gpt2', 'sd']);
export type Family = z.infer<typeof family>;

export const me = z.object({
  user: z.object({ id: z.string(), name: z.string() }),
  admin: z.boolean(),
  has_password: z.boolean().optional(), // this and what follows is told by GET /api/me alone
  storage: z
    .object({
      quota_bytes: z.number().nullable(), // null: no end
      used_bytes: z.number(),
      files_bytes: z.number(),
      models_bytes: z.number(),
      jobs_bytes: z.number(),
    })
    .optional(),
});
export type Me = z.infer<typeof me>;

export const model = z.object({
  id: z.string(),
  created: z.number(),
  parent: z.string().nullable(),
  family,
  n_layers: z.number(),
  context_tokens: z.number(),
  available: z.boolean(),
});
export type Model = z.infer<typeof model>;

export const list = <T extends z.ZodType>(item: T) => z.object({ data: z.array(item), has_more: z.boolean() });

export const modelLayers = z.object({
  n_layers: z.number(),
  parts: z.record(z.string(), z.number()),
  layers: z.array(z.object({ block: z.string().optional() })).default([]), // named where they are blocks of a UNet
});
export type ModelLayers = z.infer<typeof modelLayers>;

export const layerSpec = z.object({
  method: z.enum(['full', 'lora', 'dora']),
  parts: z.array(z.string()),
  layers: z.string(),
  match: z.string().nullish(),
  component: z.string().nullish(), // of a model that is more than one network
  rank: z.number().optional(),
  alpha: z.number().nullish(),
  rslora: z.boolean().optional(),
  quantize: z.enum(['none', '8bit', '4bit']).optional(),
});
export type LayerSpec = z.infer<typeof layerSpec>;

/** As people write it: the gpu judges what is in it. */
const written = z.record(z.string(), z.unknown());
export const layersJson = z.union([written, z.array(written).min(1)]);
export type Layers = LayerSpec | z.infer<typeof layersJson>;

export const preview = z.object({
  summary: z.string(),
  selected_tensors: z.number(),
  total_tensors: z.number(),
  trainable_parameters: z.number(),
  total_parameters: z.number(),
  memory_bytes: z.record(z.string(), z.number()),
  batch: z.object({ rows: z.number(), tokens: z.number().optional(), width: z.number().optional() }),
  prefix_bytes: z.number().optional(), // of the frozen layers' output on the gpu's disk
  checkpoint_bytes: z.number().optional(),
  time_s: z.number().optional(), // where the gpu can tell
  chat_pause_s: z.number().optional(),
  notes: z.array(z.string()),
  tensors: z.array(
    z.object({
      name: z.string(),
      part: z.string(),
      layer: z.number().nullable(),
      method: z.string(),
      shape: z.array(z.number()),
      parameters: z.number(),
    }),
  ),
});
export type Preview = z.infer<typeof preview>;

export const dataKind = z.enum(['text', 'pictures']).catch('text'); // older relays know text alone
export type DataKind = z.infer<typeof dataKind>;

export const file = z.object({
  id: z.string(),
  filename: z.string(),
  bytes: z.number(),
  created_at: z.number(),
  rows: z.number(),
  kind: dataKind,
  captioned: z.number().nullish(), // pictures with a caption: all of them or none
});
export type DataFile = z.infer<typeof file>;

/** What pictures without captions show. */
export const concept = z.object({
  prompt: z.string(),
  class_prompt: z.string().nullish(),
  class_pictures: z.number().optional(),
  prior_weight: z.number().optional(),
});
export type Concept = z.infer<typeof concept>;

export const hyperparameters = z.record(z.string(), z.unknown()); // numbers, "auto", and what later servers add

export const jobStatus = z.enum(['queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled']).catch('running');
export type JobStatus = z.infer<typeof jobStatus>;
export const OPEN_STATUS: readonly JobStatus[] = ['queued', 'running', 'paused'];

export const job = z.object({
  id: z.string(),
  created_at: z.number(),
  finished_at: z.number().nullable(),
  estimated_finish: z.number().nullable(),
  model: z.string(),
  fine_tuned_model: z.string().nullable(),
  status: jobStatus,
  hyperparameters,
  training_file: z.string(),
  validation_file: z.string().nullable(),
  sample_prompts: z.array(z.string()).default([]),
  concept: concept.nullish(),
  trained_tokens: z.number().nullable(),
  error: z.object({ message: z.string(), code: z.string().nullish() }).nullable(),
  user_provided_suffix: z.string().nullable(),
  layers: z.array(layerSpec),
  gpu: z.string().nullable(),
  attempts: z.number(),
  waiting_for: z.object({ reason: z.string(), message: z.string() }).nullish(), // of a queued job
  pausing: z.boolean(), // asked for, and the gpu has not given the job back yet
});
export type Job = z.infer<typeof job>;

/** What a run says about itself at its end. Read loosely: an older or newer one still shows what it has. */
export const report = z.object({
  perplexity: z.object({ before: z.number().nullable(), after: z.number().nullable() }).optional(),
  answers: z.array(z.object({ prompt: z.string(), before: z.string(), after: z.string() })).default([]),
  changes: z
    .object({
      layers: z.array(z.object({ layer: z.union([z.number(), z.string()]).nullable(), relative_change: z.number() })),
    })
    .optional(),
});
export type Report = z.infer<typeof report>;

export const checkpoint = z.object({ step_number: z.number() });

export const jobEvent = z.object({
  id: z.string(),
  created_at: z.number(),
  level: z.enum(['info', 'warn', 'error']),
  type: z.string(),
  message: z.string(),
  data: z.record(z.string(), z.unknown()),
});
export type JobEvent = z.infer<typeof jobEvent>;

export const batchStatus = z
  .enum(['validating', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled', 'failed'])
  .catch('in_progress');
export type BatchStatus = z.infer<typeof batchStatus>;

export const batch = z.object({
  id: z.string(),
  endpoint: z.string(),
  model: z.string(),
  status: batchStatus,
  errors: z.object({ data: z.array(z.object({ message: z.string(), code: z.string().nullish() })) }).nullable(),
  input_file_id: z.string(),
  output_file_id: z.string().nullable(),
  error_file_id: z.string().nullable(),
  created_at: z.number(),
  expires_at: z.number(),
  finalizing_at: z.number().nullable(),
  completed_at: z.number().nullable(),
  failed_at: z.number().nullable(),
  expired_at: z.number().nullable(),
  cancelled_at: z.number().nullable(),
  request_counts: z.object({ total: z.number(), completed: z.number(), failed: z.number() }),
  usage: z.object({ input_tokens: z.number(), output_tokens: z.number() }),
  metadata: z.record(z.string(), z.string()).nullable(),
  gpu: z.string().nullable(),
  attempts: z.number(),
  paused: z.boolean(),
  pausing: z.boolean(),
  estimated_finish: z.number().nullable(),
  waiting_for: z.object({ reason: z.string(), message: z.string() }).nullish(),
});
export type Batch = z.infer<typeof batch>;

/** Whom the rows of a batch's file ask, and where. */
export const batchFileReport = z.object({ rows: z.number(), endpoint: z.string(), model: z.string() });

export const gpu = z.object({
  id: z.string(),
  name: z.string(),
  alive: z.boolean(),
  reachable: z.boolean(),
  breaker: z.enum(['closed', 'open', 'half-open']).catch('closed'),
  draining: z.boolean(),
  tunnel: z.string(),
  device: z.object({
    kind: z.string(),
    name: z.string(),
    memory_bytes: z.number(),
    precision: z.string(),
    precision_why: z.string(),
  }),
  free_bytes: z.number(),
  models: z.array(z.object({ id: z.string(), family, loaded: z.boolean() })),
  active_requests: z.number(),
  job: z.object({ id: z.string().nullable(), status: z.string() }).nullable(), // id: only of one's own
  enrolled_at: z.number(),
  last_seen_at: z.number(),
  runtime_ends_at: z.number().nullable(),
});
export type Gpu = z.infer<typeof gpu>;

export const enrolToken = z.object({ relay_url: z.string(), token: z.string() });

export const madeToken = z.object({
  id: z.string(),
  name: z.string().nullable(),
  prefix: z.string(),
  reusable: z.boolean(),
  created_at: z.number(),
  expires_at: z.number().nullable(),
  used_at: z.number().nullable(),
  revoked_at: z.number().nullable(),
  gpus: z.number(), // that came with it last
});
export type MadeToken = z.infer<typeof madeToken>;
export const newToken = z.object({ id: z.string(), token: z.string() });

export const person = z.object({
  id: z.string(),
  name: z.string(),
  created_at: z.number(),
  disabled_at: z.number().nullable(),
  deleting_at: z.number().nullable(),
  has_password: z.boolean(),
});
export type Person = z.infer<typeof person>;

export const auditEntry = z.object({
  id: z.number(),
  at: z.number(),
  who: z.string(),
  action: z.string(),
  target: z.string(),
  address: z.string(),
});
export type AuditEntry = z.infer<typeof auditEntry>;

export const apiKey = z.object({
  id: z.string(),
  name: z.string().nullable(),
  user: z.string(),
  prefix: z.string(),
  created_at: z.number(),
  last_used_at: z.number().nullable(),
  current: z.boolean(), // the one that this session was opened with
  fixed: z.boolean(), // the admin's, which the settings give
  scopes: z.array(z.string()),
  expires_at: z.number().nullable(),
  requests_per_minute: z.number().nullable(),
  tokens_per_month: z.number().nullish(),
  spend_per_month: z.number().nullish(),
});
export type ApiKey = z.infer<typeof apiKey>;
export const newKey = z.object({ id: z.string(), key: z.string() });

/** One frame of /api/generations: of the relay while it looks for a gpu, then the gpu's own. */
export const generationFrame = z.union([
  z.object({ type: z.literal('started'), id: z.string() }),
  z.object({ type: z.literal('waiting'), place: z.number(), reason: z.string() }),
  z.object({ type: z.literal('reading'), gpu: z.string() }),
  z.object({ error: z.object({ message: z.string(), code: z.string().nullish(), param: z.string().nullish() }) }),
  z.object({
    choices: z.array(
      z.object({
        delta: z.object({ content: z.string().nullish() }).optional(),
        text: z.string().optional(),
        finish_reason: z.string().nullish(),
      }),
    ),
    usage: z.object({ prompt_tokens: z.number(), completion_tokens: z.number() }).nullish(),
  }),
  z.object({
    type: z.enum(['image_generation.partial_image', 'image_generation.completed']),
    b64_json: z.string(),
    output_format: z.string(),
    index: z.number(),
    seed: z.number(),
  }),
]);
export type GenerationFrame = z.infer<typeof generationFrame>;

export const webhook = z.object({
  id: z.string(),
  name: z.string(),
  url: z.string(),
  event_types: z.array(z.string()),
  created_at: z.number(),
});
export type Webhook = z.infer<typeof webhook>;
export const newWebhook = webhook.extend({ signing_secret: z.string() });

export const delivery = z.object({
  id: z.union([z.string(), z.number()]),
  event_type: z.string(),
  job_id: z.string(),
  state: z.enum(['waiting', 'delivered', 'given_up']),
  attempts: z.number(),
  last_status: z.number().nullable(),
  last_error: z.string().nullable(),
  created_at: z.number(),
  next_at: z.number().nullable(),
  delivered_at: z.number().nullable(),
});
export type Delivery = z.infer<typeof delivery>;

const used = z.object({
  prompt_tokens: z.number(),
  completion_tokens: z.number(),
  trained_tokens: z.number(),
  gpu_s: z.number(), // that jobs held a gpu
  tokens: z.number(),
  spend: z.number(),
});
const keyUsage = used.extend({
  id: z.string(),
  name: z.string().nullable(),
  prefix: z.string(),
  revoked: z.boolean(),
  tokens_per_month: z.number().nullable(),
  spend_per_month: z.number().nullable(),
});
export type KeyUsage = z.infer<typeof keyUsage>;
export const usage = used.extend({
  ends_at: z.number(),
  prices: z.object({ per_million_tokens: z.number(), per_gpu_hour: z.number() }),
  keys: z.array(keyUsage),
});

export const grown = file.extend({ added: z.number().default(1) }); // a new data set has what it was made with

const lined = z.object({ line: z.number(), message: z.string() });
const seen = z.object({
  max_length_tokens: z.number(),
  rows: z.number(), // that were looked at
  tokens: z.object({
    shortest: z.number(),
    p50: z.number(),
    p90: z.number(),
    longest: z.number(),
  }),
  truncated: z.number(),
  truncated_lines: z.array(z.number()),
  nothing_to_learn: z.number(),
  nothing_to_learn_lines: z.array(z.number()),
  first_refused: z.array(lined),
  example: z
    .object({ line: z.number(), parts: z.array(z.object({ text: z.string(), learned: z.boolean() })) })
    .nullable(),
});
export type Seen = z.infer<typeof seen>;
export const fileReport = z.object({
  rows: z.number(),
  errors: z.record(z.string(), z.number()),
  first_errors: z.array(lined),
  duplicates: z.number(),
  duplicate_lines: z.array(z.number()),
  seen: seen.optional(),
});
export type FileReport = z.infer<typeof fileReport>;

const named = z.object({ name: z.string(), message: z.string() });
/** Of a zip of pictures. */
export const pictureReport = z.object({
  rows: z.number(),
  captioned: z.number(),
  errors: z.record(z.string(), z.number()),
  first_errors: z.array(named),
  repaired: z.record(z.string(), z.number()),
  formats: z.record(z.string(), z.number()),
  duplicates: z.number(),
  duplicate_names: z.array(z.string()),
  ignored: z.number(),
  ignored_names: z.array(z.string()),
  smallest_side: z.number().nullable(),
  median_side: z.number().nullable(),
  largest_side: z.number().nullable(),
  sample: z
    .array(
      z.object({ name: z.string(), caption: z.string(), width: z.number(), height: z.number(), thumbnail: z.string() }),
    )
    .default([]),
});
export type PictureReport = z.infer<typeof pictureReport>;

/** The training form as plain values, and the request that comes of them. */
import { layersJson, type Layers, type LayerSpec } from '@/types/api';
import type { NewJob } from './queries';

export const PARTS = ['attn', 'mlp', 'norm', 'embed', 'head'] as const;
export type Part = (typeof PARTS)[number];

export const METHODS = ['lora', 'dora', 'full'] as const;
export type Method = (typeof METHODS)[number];
export const QUANTIZE = ['none', '8bit', '4bit'] as const;
export type Quantize = (typeof QUANTIZE)[number];

interface Numbers {
  min: number;
  max: number;
  decimal?: true;
}

/** What the API takes for each, beside "auto". */
export const NUMBERS = {
  n_epochs: { min: 1, max: 100 },
  batch_size: { min: 1, max: 256 },
  learning_rate: { min: 0.000_000_1, max: 10, decimal: true },
  max_length_tokens: { min: 8, max: 1_000_000 },
  warmup_ratio: { min: 0, max: 0.5, decimal: true },
  weight_decay: { min: 0, max: 1, decimal: true },
  max_gradient_norm: { min: 0, max: 1_000_000, decimal: true },
  micro_batch_rows: { min: 1, max: 256 },
  early_stop_patience: { min: 0, max: 100 },
  samples_every_steps: { min: 1, max: 1_000_000 },
} as const satisfies Record<string, Numbers>;

export const CHOICES = {
  schedule: ['linear', 'cosine', 'constant'],
  optimizer: ['adamw', 'adamw_8bit'],
  train_on: ['completions', 'all'],
} as const;

export const SWITCHES = ['packing', 'activation_checkpointing', 'prefix_cache', 'stream_layers'] as const;

export type NumberName = keyof typeof NUMBERS;
export type ChoiceName = keyof typeof CHOICES;
export type SwitchName = (typeof SWITCHES)[number];
export type HyperName = NumberName | ChoiceName | SwitchName;
export type HyperValue = number | string | boolean;

export const BASIC = ['n_epochs', 'batch_size', 'learning_rate', 'max_length_tokens'] as const satisfies NumberName[];
export const HYPER: readonly HyperName[] = [
  ...(Object.keys(NUMBERS) as NumberName[]),
  ...(Object.keys(CHOICES) as ChoiceName[]),
  ...SWITCHES,
];

export const MAX_SAMPLES = 8;
export const MAX_SAMPLE_CHARS = 2_000;

export interface Form {
  model: string | null; // a base model, or a tuned one that is trained further
  fileId: string | null;
  validationId: string | null;
  method: Method;
  quantize: Quantize;
  parts: readonly Part[];
  layers: string;
  match: string;
  rank: number;
  alpha: number | null;
  rslora: boolean;
  json: string; // layer specs as JSON: where it is not empty, it stands for all of the fields above
  hyper: Partial<Record<HyperName, HyperValue>>; // what is not there is "auto"
  samples: readonly string[];
  suffix: string;
}

export const EMPTY: Form = {
  model: null,
  fileId: null,
  validationId: null,
  method: 'lora',
  quantize: 'none',
  parts: ['attn', 'mlp'],
  layers: 'last:8',
  match: '',
  rank: 16,
  alpha: null,
  rslora: false,
  json: '',
  hyper: {},
  samples: [],
  suffix: '',
};

/** LoRA adapts matrices; norms and the embedding have none. */
export const canHave = (method: Method, part: Part): boolean =>
  method === 'full' || part === 'attn' || part === 'mlp' || part === 'head';

export function specOf(form: Form): LayerSpec {
  const low = form.method !== 'full';
  return {
    method: form.method,
    parts: form.parts.filter((part) => canHave(form.method, part)),
    layers: form.layers.trim(),
    ...(form.match.trim() ? { match: form.match.trim() } : {}),
    ...(low ? { rank: form.rank } : {}),
    ...(low && form.alpha !== null ? { alpha: form.alpha } : {}),
    ...(low && form.rslora ? { rslora: true } : {}),
    ...(low && form.quantize !== 'none' ? { quantize: form.quantize } : {}),
  };
}

/** What the layer spec's language can say beyond these fields: finer parts, or several specs. Undefined: unreadable. */
export function layersOf(form: Form): Layers | undefined {
  if (form.json.trim() === '') {
    const spec = specOf(form);
    return spec.parts.length > 0 ? spec : undefined;
  }
  try {
    return layersJson.parse(JSON.parse(form.json));
  } catch {
    return undefined;
  }
}

export const suffixIsGood = (suffix: string): boolean => /^[A-Za-z0-9_-]{0,64}$/.test(suffix);

/** Only what was chosen: the rest is "auto" by itself. */
export const hyperOf = (form: Form): Record<string, HyperValue> =>
  Object.fromEntries(
    HYPER.flatMap((name) => {
      const value = form.hyper[name];
      return value === undefined ? [] : [[name, value]];
    }),
  );

/** Null while something is still to be filled in. */
export function requestOf(form: Form): NewJob | null {
  const layers = layersOf(form);
  if (!form.model || !form.fileId || !layers || !suffixIsGood(form.suffix)) return null;
  const samples = form.samples.map((prompt) => prompt.trim()).filter(Boolean);
  return {
    model: form.model,
    training_file: form.fileId,
    ...(form.validationId ? { validation_file: form.validationId } : {}),
    ...(form.suffix ? { suffix: form.suffix } : {}),
    ...(samples.length > 0 ? { sample_prompts: samples } : {}),
    layers,
    method: { type: 'supervised', supervised: { hyperparameters: hyperOf(form) } },
  };
}

interface Earlier {
  model: string;
  training_file: string;
  validation_file?: string | null;
  user_provided_suffix: string | null;
  layers: LayerSpec[];
  hyperparameters?: Record<string, unknown>;
  sample_prompts?: string[];
}

/** "Train again with changes": what the job was started with, as far as the form can say it. */
export function formOf(job: Earlier): Form {
  const [spec, ...more] = job.layers;
  const known = (part: string): part is Part => (PARTS as readonly string[]).includes(part);
  const beyond = more.length > 0 || !spec?.parts.every(known);
  return {
    ...EMPTY,
    model: job.model,
    fileId: job.training_file,
    validationId: job.validation_file ?? null,
    suffix: job.user_provided_suffix ?? '',
    samples: job.sample_prompts ?? [],
    hyper: Object.fromEntries(
      HYPER.flatMap((name) => {
        const value = job.hyperparameters?.[name];
        const given = typeof value === 'number' || typeof value === 'boolean' || typeof value === 'string';
        return given && value !== 'auto' ? [[name, value]] : [];
      }),
    ),
    ...(beyond ? { json: JSON.stringify(job.layers, null, 1) } : {}),
    ...(spec && !beyond
      ? {
          method: spec.method,
          quantize: spec.quantize ?? 'none',
          parts: spec.parts.filter(known),
          layers: spec.layers,
          match: spec.match ?? '',
          rank: spec.rank ?? EMPTY.rank,
          alpha: spec.alpha ?? null,
          rslora: spec.rslora ?? false,
        }
      : {}),
  };
}

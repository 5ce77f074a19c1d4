/** The training form as plain values, and the request that comes of them. */
import type { LayerSpec } from '@/types/api';
import type { NewJob } from './queries';

export const PARTS = ['attn', 'mlp', 'norm', 'embed', 'head'] as const;
export type Part = (typeof PARTS)[number];
export const HYPER = ['n_epochs', 'batch_size', 'learning_rate', 'max_length_tokens'] as const;
export type Hyper = (typeof HYPER)[number];

export interface Form {
  model: string | null;
  fileId: string | null;
  method: 'lora' | 'full';
  parts: readonly Part[];
  layers: string;
  match: string;
  rank: number;
  alpha: number | null;
  hyper: Record<Hyper, number | null>; // null: auto
  suffix: string;
}

export const EMPTY: Form = {
  model: null,
  fileId: null,
  method: 'lora',
  parts: ['attn', 'mlp'],
  layers: 'last:8',
  match: '',
  rank: 16,
  alpha: null,
  hyper: { n_epochs: null, batch_size: null, learning_rate: null, max_length_tokens: null },
  suffix: '',
};

/** LoRA adapts matrices; norms and the embedding have none. */
export const canHave = (method: Form['method'], part: Part): boolean =>
  method === 'full' || part === 'attn' || part === 'mlp' || part === 'head';

export function specOf(form: Form): LayerSpec {
  return {
    method: form.method,
    parts: form.parts.filter((part) => canHave(form.method, part)),
    layers: form.layers.trim(),
    ...(form.match.trim() ? { match: form.match.trim() } : {}),
    ...(form.method === 'lora' ? { rank: form.rank } : {}),
    ...(form.method === 'lora' && form.alpha !== null ? { alpha: form.alpha } : {}),
  };
}

export const suffixIsGood = (suffix: string): boolean => /^[A-Za-z0-9_-]{0,64}$/.test(suffix);

export const hyperOf = (form: Form): Record<string, number | 'auto'> =>
  Object.fromEntries(HYPER.map((name) => [name, form.hyper[name] ?? ('auto' as const)]));

/** Null while something is still to be filled in. */
export function requestOf(form: Form): NewJob | null {
  const spec = specOf(form);
  if (!form.model || !form.fileId || spec.parts.length === 0 || !suffixIsGood(form.suffix)) return null;
  return {
    model: form.model,
    training_file: form.fileId,
    ...(form.suffix ? { suffix: form.suffix } : {}),
    layers: spec,
    method: { type: 'supervised', supervised: { hyperparameters: hyperOf(form) } },
  };
}

/** "Train again with changes": what the job was started with, as far as the form can say it. */
export function formOf(job: {
  model: string;
  training_file: string;
  user_provided_suffix: string | null;
  layers: LayerSpec[];
}): Form {
  const spec = job.layers[0];
  const known = (part: string): part is Part => (PARTS as readonly string[]).includes(part);
  return {
    ...EMPTY,
    model: job.model,
    fileId: job.training_file,
    suffix: job.user_provided_suffix ?? '',
    ...(spec
      ? {
          method: spec.method === 'full' ? 'full' : 'lora',
          parts: spec.parts.filter(known),
          layers: spec.layers,
          match: spec.match ?? '',
          rank: spec.rank ?? EMPTY.rank,
          alpha: spec.alpha ?? null,
        }
      : {}),
  };
}

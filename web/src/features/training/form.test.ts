import { expect, it } from 'vitest';
import {
  canHave,
  choiceOf,
  EMPTY,
  fit,
  formOf,
  hasHyper,
  hyperOf,
  partsOf,
  requestOf,
  specOf,
  suffixIsGood,
} from './form';

const filled = { ...EMPTY, model: 'm', fileId: 'file-1' };

it('asks for nothing until there are a model and examples', () => {
  expect(requestOf(EMPTY)).toBeNull();
  expect(requestOf({ ...EMPTY, model: 'm' })).toBeNull();
  expect(requestOf(filled)).not.toBeNull();
});

it('sends only what was chosen, so that the rest is "auto", and nothing that is empty', () => {
  expect(
    requestOf({ ...filled, hyper: { n_epochs: 3, packing: false, schedule: 'cosine' }, samples: ['', ' '] }),
  ).toEqual({
    model: 'm',
    training_file: 'file-1',
    layers: { method: 'lora', parts: ['attn', 'mlp'], layers: 'last:8', rank: 16 },
    method: {
      type: 'supervised',
      supervised: { hyperparameters: { n_epochs: 3, schedule: 'cosine', packing: false } },
    },
  });
});

it('leaves out of LoRA what has no matrices, and out of full training what only LoRA has', () => {
  expect(specOf({ ...filled, parts: ['attn', 'norm'] }).parts).toEqual(['attn']);
  expect(specOf({ ...filled, method: 'full', parts: ['norm'], rslora: true, quantize: '4bit', alpha: 3 })).toEqual({
    method: 'full',
    parts: ['norm'],
    layers: 'last:8',
  });
  expect(specOf({ ...filled, method: 'dora', rslora: true, quantize: '8bit' })).toEqual({
    method: 'dora',
    parts: ['attn', 'mlp'],
    layers: 'last:8',
    rank: 16,
    rslora: true,
    quantize: '8bit',
  });
});

it('takes only names that can be part of a model id', () => {
  expect(['', 'captain_2', 'a-b'].every(suffixIsGood)).toBe(true);
  expect(['a b', '선장', 'x'.repeat(65)].some(suffixIsGood)).toBe(false);
});

it('takes the whole language as JSON, and asks for nothing while it can not be read', () => {
  const json = '[{"parts": ["attn.q"], "layers": "3"}, {"method": "full", "parts": ["norm"]}]';
  expect(requestOf({ ...filled, json })?.layers).toEqual(JSON.parse(json));
  for (const bad of ['{', '[]', '3', '"all"', '[1]']) expect(requestOf({ ...filled, json: bad })).toBeNull();
  expect(requestOf({ ...filled, parts: [], json: '{"parts": ["attn.q"]}' })?.layers).toEqual({ parts: ['attn.q'] });
});

it('keeps what an earlier job trained, where its own fields could not say it', () => {
  const layers = [
    { method: 'lora' as const, parts: ['attn.q'], layers: '3', rank: 4 },
    { method: 'full' as const, parts: ['norm'], layers: 'all' },
  ];
  for (const some of [layers, layers.slice(0, 1)]) {
    const again = formOf({ model: 'm', training_file: 'file-1', user_provided_suffix: null, layers: some });
    expect(requestOf(again)?.layers).toEqual(some);
  }
});

it('fills itself from an earlier job', () => {
  const form = {
    ...filled,
    suffix: 'captain',
    layers: '3-5',
    method: 'dora' as const,
    validationId: 'file-2',
    samples: ['Ahoy?'],
    hyper: { n_epochs: 2, prefix_cache: true },
  };
  const request = requestOf(form);
  const again = formOf({
    model: 'm',
    training_file: 'file-1',
    validation_file: 'file-2',
    user_provided_suffix: 'captain',
    layers: [specOf(form)],
    hyperparameters: { n_epochs: 2, batch_size: 'auto', prefix_cache: true, unheard_of: 3 },
    sample_prompts: ['Ahoy?'],
  });
  expect(requestOf(again)).toEqual(request);
});

const drawing = fit(filled, 'pictures');

it('begins anew for another kind of model with what does not suit it, and keeps the rest', () => {
  expect(specOf(drawing)).toEqual({
    method: 'lora',
    parts: ['attn.self', 'attn.cross'],
    layers: 'all',
    component: 'unet',
    rank: 16,
  });
  expect(fit({ ...drawing, rank: 4, parts: ['conv'] }, 'pictures').parts).toEqual(['conv']);
  const back = fit({ ...drawing, suffix: 'kite' }, 'text');
  expect(requestOf(back)?.layers).toEqual(requestOf(filled)?.layers);
  expect(back.suffix).toBe('kite');
});

it('offers each network its own parts, and LoRA only those that have matrices', () => {
  expect(partsOf(drawing).filter((part) => canHave('lora', part))).toEqual(['attn.self', 'attn.cross', 'mlp', 'time']);
  expect(partsOf({ ...drawing, ...choiceOf('text_encoder') })).toEqual(['attn', 'mlp', 'norm', 'embed']);
});

it('sends only the settings that the kind of model has', () => {
  const hyper = { n_epochs: 2, packing: true, min_snr_gamma: 0, resolution: 64, train_on: 'all' };
  expect(hyperOf({ ...drawing, hyper })).toEqual({ n_epochs: 2, min_snr_gamma: 0, resolution: 64 });
  expect(hyperOf({ ...filled, hyper })).toEqual({ n_epochs: 2, packing: true, train_on: 'all' });
  expect(hasHyper('pictures', 'max_length_tokens')).toBe(false);
});

it('asks what pictures without captions show, and says nothing of a class that nobody named', () => {
  expect(requestOf(drawing, false)).toBeNull();
  expect(requestOf(drawing, true)).not.toHaveProperty('concept');
  const concept = { prompt: ' a photo of sks dog ', classPrompt: '', classPictures: 8, priorWeight: 0.5 };
  expect(requestOf({ ...drawing, concept }, false)?.concept).toEqual({ prompt: 'a photo of sks dog' });
  expect(requestOf({ ...drawing, concept: { ...concept, classPrompt: 'a dog' } }, false)?.concept).toEqual({
    prompt: 'a photo of sks dog',
    class_prompt: 'a dog',
    class_pictures: 8,
    prior_weight: 0.5,
  });
  expect(requestOf({ ...filled, concept }, false)).not.toHaveProperty('concept');
});

it('fills itself from an earlier job on pictures', () => {
  const form = {
    ...drawing,
    ...choiceOf('text_encoder'),
    concept: { prompt: 'sks dog', classPrompt: 'dog', classPictures: 4, priorWeight: 1 },
    hyper: { resolution: 64, caption_dropout: 0.1 },
    samples: ['sks dog'],
  };
  const request = requestOf(form, false);
  const again = formOf({
    model: 'm',
    training_file: 'file-1',
    user_provided_suffix: null,
    layers: [specOf(form)],
    hyperparameters: { resolution: 64, caption_dropout: 0.1, n_epochs: 'auto' },
    sample_prompts: ['sks dog'],
    concept: request?.concept,
  });
  expect(requestOf(fit(again, 'pictures'), false)).toEqual(request);
});

it('keeps as JSON what an earlier job on pictures trained, where its fields could not say it', () => {
  const spec = { method: 'lora' as const, parts: ['attn'], layers: 'mid', component: 'unet', rank: 4 };
  const again = formOf({ model: 'm', training_file: 'file-1', user_provided_suffix: null, layers: [spec] });
  const request = requestOf(fit(again, 'pictures'));
  expect(request?.layers).toEqual([spec]);
});

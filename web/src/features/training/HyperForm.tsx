import { Fold } from '@/components/Fold';
import type { DataKind } from '@/types/api';
import { NumberInput, Select, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { BASIC, CHOICES, hasHyper, NUMBERS, SWITCHES, type ChoiceName, type HyperName, type NumberName } from './form';
import css from './NewJobPage.module.css';
import type { Piece } from './LayersForm';

const GROUPS = [
  [
    'learning',
    [
      'schedule',
      'warmup_ratio',
      'optimizer',
      'weight_decay',
      'max_gradient_norm',
      'train_on',
      'min_snr_gamma',
      'caption_dropout',
    ],
  ],
  ['memory', ['micro_batch_rows', 'packing', 'activation_checkpointing', 'prefix_cache', 'stream_layers']],
  ['ending', ['early_stop_patience', 'samples_every_steps']],
] as const satisfies readonly (readonly [string, readonly HyperName[]])[];

/** Every setting of the training: those that people turn first, then the rest. All are "auto" until they are chosen. */
export function HyperForm({ form, set }: Piece) {
  const { t } = useTranslation();
  const kind = form.kind ?? 'text';
  const basic: readonly HyperName[] = BASIC[kind];
  const groups = GROUPS.map(([group, names]) => [group, names.filter((name) => hasHyper(kind, name))] as const);
  const advanced = groups.flatMap(([, names]): readonly HyperName[] => names);
  return (
    <>
      <Fold title={t('hyper.basic')} mark={basic.some((name) => form.hyper[name] !== undefined)}>
        <div className={css.pair}>
          {basic.map((name) => (
            <Field key={name} name={name} form={form} set={set} />
          ))}
        </div>
      </Fold>
      <Fold title={t('hyper.advanced')} mark={advanced.some((name) => form.hyper[name] !== undefined)}>
        {groups.map(([group, names]) => (
          <div key={group} className={css.group} role="group" aria-labelledby={`hyper-${group}`}>
            <Text fw={600} size="sm" id={`hyper-${group}`}>
              {t(`hyper.${group}`)}
            </Text>
            <div className={css.pair}>
              {names.map((name) => (
                <Field key={name} name={name} form={form} set={set} />
              ))}
            </div>
          </div>
        ))}
      </Fold>
    </>
  );
}

function Field({ name, form, set }: Piece & { name: HyperName }) {
  const { t } = useTranslation();
  const words = useHyperWords(form.kind);
  const value = form.hyper[name];
  const change = (chosen: number | string | boolean | undefined) => {
    const hyper = { ...form.hyper };
    if (chosen === undefined) delete hyper[name];
    else hyper[name] = chosen;
    set({ hyper });
  };
  const shared = { label: words(name), description: words(`${name}_text`) };
  if (isNumber(name)) {
    const limits = NUMBERS[name];
    const decimal = 'decimal' in limits;
    return (
      <NumberInput
        {...shared}
        placeholder={t('hyper.auto')}
        value={typeof value === 'number' ? value : ''}
        onChange={(given) => change(typeof given === 'number' ? given : undefined)}
        min={limits.min}
        max={limits.max}
        allowDecimal={decimal}
        hideControls={decimal}
      />
    );
  }
  const options = isChoice(name)
    ? CHOICES[name].map((each) => ({
        value: each,
        label: t(`hyper.${name}_${each}` as 'hyper.schedule_linear'),
      }))
    : [
        { value: 'true', label: t('hyper.yes') },
        { value: 'false', label: t('hyper.no') },
      ];
  return (
    <Select
      {...shared}
      value={value === undefined ? '' : String(value)}
      onChange={(given) => change(!given ? undefined : isChoice(name) ? given : given === 'true')}
      data={[{ value: '', label: t('hyper.auto') }, ...options]}
      allowDeselect={false}
    />
  );
}

const isNumber = (name: HyperName): name is NumberName => name in NUMBERS;
const isChoice = (name: HyperName): name is ChoiceName =>
  !(SWITCHES as readonly string[]).includes(name) && name in CHOICES;

/** Names of the settings and what they do: pictures have some words of their own. */
export function useHyperWords(kind: DataKind | null): (name: HyperName | `${HyperName}_text`) => string {
  const { t, i18n } = useTranslation();
  return (name) => {
    const own = `pictured.${name}`;
    return t((kind === 'pictures' && i18n.exists(own) ? own : `hyper.${name}`) as 'hyper.n_epochs');
  };
}

import { NumberInput, Text, TextInput } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import type { ConceptForm as Concept } from './form';
import { CLASS_PICTURES, MAX_SAMPLE_CHARS } from './form';
import type { Piece } from './LayersForm';
import css from './NewJobPage.module.css';

/** What pictures without captions show, and what of its kind the model shall not forget. */
export function ConceptForm({ form, set }: Piece) {
  const { t } = useTranslation();
  const { concept } = form;
  const change = (fields: Partial<Concept>) => set({ concept: { ...concept, ...fields } });
  return (
    <section className={css.group} aria-labelledby="concept">
      <div>
        <Text fw={600} size="sm" id="concept">
          {t('pictured.concept')}
        </Text>
        <Text size="sm" c="dimmed">
          {t('pictured.conceptText')}
        </Text>
      </div>
      <TextInput
        label={t('pictured.prompt')}
        description={t('pictured.promptText')}
        placeholder="a photo of sks dog"
        value={concept.prompt}
        onChange={(event) => change({ prompt: event.currentTarget.value })}
        maxLength={MAX_SAMPLE_CHARS}
        required
        autoComplete="off"
      />
      <TextInput
        label={t('pictured.classPrompt')}
        description={t('pictured.classPromptText')}
        placeholder="a photo of a dog"
        value={concept.classPrompt}
        onChange={(event) => change({ classPrompt: event.currentTarget.value })}
        maxLength={MAX_SAMPLE_CHARS}
        autoComplete="off"
      />
      {concept.classPrompt.trim() ? (
        <div className={css.pair}>
          <NumberInput
            label={t('pictured.classPictures')}
            description={t('pictured.classPicturesText')}
            placeholder={String(CLASS_PICTURES)}
            value={concept.classPictures ?? ''}
            onChange={(value) => change({ classPictures: typeof value === 'number' ? value : null })}
            min={1}
            max={500}
            allowDecimal={false}
          />
          <NumberInput
            label={t('pictured.priorWeight')}
            description={t('pictured.priorWeightText')}
            placeholder="1"
            value={concept.priorWeight ?? ''}
            onChange={(value) => change({ priorWeight: typeof value === 'number' ? value : null })}
            min={0}
            max={100}
            step={0.1}
          />
        </div>
      ) : null}
    </section>
  );
}
